"""Hessians and solves in the shapes of the papers' models against their loop, and peers that can be imported here."""

import argparse
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu.clock import product_rate, seconds
from benchmarks.gpu.steps import Setting
from benchmarks.lab.tables import Row
from benchmarks.speed.solve import MODELS, QUICK
from benchmarks.speed.solve_linears import Linear, make_linears
from benchmarks.speed.solve_peers import gptqmodel, llm_compressor
from moeq.quant.hessian import empty_state, mean_hessian
from moeq.quant.hessian_groups import accumulate_groups

PEERS: dict[str, tuple[str, Callable[..., Callable[[], object]]]] = {
    "llm-compressor": ("llmcompressor", llm_compressor), "GPTQModel": ("gptqmodel", gptqmodel),
}  # fmt: skip


def solves(setting: Setting) -> Iterator[Row]:
    """Seconds per expert of each model's block; the loop and peers work on one expert."""
    models = {QUICK: (4, 64, 32)} if setting.quick else {name: sizes for name, sizes in MODELS.items() if name != QUICK}
    for name, sizes in models.items():
        experts = min(sizes[0], 2 if setting.quick else 16)
        tokens = 64 if setting.quick else 256
        o = argparse.Namespace(experts=experts, batches=2, tokens=tokens, device=setting.device.type)
        linears = make_linears(sizes, o, 0)
        hessians = [grouped_hessian(linear) for linear in linears]
        loop = seconds(partial(each, Linear.loop_hessian, linears), setting.device, 1)
        ours = seconds(partial(each, grouped_hessian, linears), setting.device)
        rate = product_rate(torch.float32, setting.device, 256 if setting.quick else 4096)
        floor = sum(o.batches * o.tokens * linear.weight_EOI.shape[2] ** 2 for linear in linears) / rate
        yield row(f"Hessians, {name}", loop / experts, ours / experts, floor, sizes[0])
        ours = seconds(partial(each, Linear.our_solve, linears, hessians), setting.device, 2)
        one = [(first_expert(linear), h[:1]) for linear, h in zip(linears, hessians, strict=True)]
        loop = seconds(partial(each, Linear.loop_solve, *zip(*one, strict=True)), setting.device, 1)
        floor = sum(solve_operations(linear) for linear in linears) / rate
        yield row(f"solve, {name}", loop, ours / experts, floor, sizes[0])
        for peer, (module, solver) in PEERS.items():
            if find_spec(module) is not None:
                works = [solver(as_peers_take_it(linear, h)) for linear, h in one]
                theirs = seconds(partial(each, operator.call, works), setting.device, 1)
                ratio = theirs / (ours / experts)
                yield {"what": f"{peer}, {name}", "peer_s": theirs, "moeq_s": ours / experts, "peer_by_moeq": ratio}


def each(work: Callable[..., object], *given: Sequence[Any]) -> None:
    """Do something with each linear."""
    for arguments in zip(*given, strict=True):
        work(*arguments)


def row(what: str, loop: float, ours: float, floor: float, experts: int) -> Row:
    """Seconds per expert beside those of the loop and of the products alone."""
    return {
        "what": what, "loop_s": loop, "moeq_s": ours, "loop_by_moeq": loop / ours, "floor_share": floor / ours,
        "whole_block_s": ours * experts,
    }  # fmt: skip


def grouped_hessian(linear: Linear) -> torch.Tensor:
    """As a calibration pass on a GPU makes it."""
    experts, _, in_features = linear.weight_EOI.shape
    state = empty_state(experts, in_features, linear.weight_EOI.device)
    for x_ETI in linear.batches_ETI:
        starts = [expert * x_ETI.shape[1] for expert in range(experts + 1)]
        x_NI = x_ETI.flatten(0, 1)
        accumulate_groups(state, x_NI, torch.ones(len(x_NI), device=x_NI.device), starts, 1.0)
    return mean_hessian(state)


def first_expert(linear: Linear) -> Linear:
    """The same with one expert."""
    one = object.__new__(Linear)
    one.parts, one.weight_EOI = linear.parts, linear.weight_EOI[:1]
    one.batches_ETI = [x_ETI[:1] for x_ETI in linear.batches_ETI]
    return one


def as_peers_take_it(linear: Linear, hessian_EII: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gate and up as a batch, or down; inputs; Hessian."""
    inputs_TI = torch.cat([x_ETI[0] for x_ETI in linear.batches_ETI]).float()
    return {
        "weight": torch.stack(linear.weight_EOI[0].chunk(linear.parts)),
        "inputs": inputs_TI,
        "hessian": hessian_EII[0],
    }


def solve_operations(linear: Linear) -> float:
    """Of one expert: feedback and factor."""
    _, rows, columns = linear.weight_EOI.shape
    return rows * columns**2 + columns**3 / 3
