"""Learned rounding of a block runs, and never leaves it worse, in every family."""

from functools import partial
from pathlib import Path

import pytest
import torch

from moeq.disk.waiting import WaitingStates
from moeq.fit.activations import ActivationStore, BlockBatch
from moeq.fit.learn_block import tune_block
from moeq.fit.run import Needs, Run
from moeq.fit.solve import quantize_sites
from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls
from moeq.quant.learned import LearnedSpec, learn
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec
from tests.tiny import FAMILIES, tiny_model

GRID = GridSpec(bits=3, group_size=16)


def solved(family: str) -> tuple[Adapter, Run, int, list[BlockBatch]]:
    """A tiny model whose last block with experts is rounded to nearest, and data at that block."""
    adapter = Adapter(tiny_model(family))
    block = max(site.block for site in adapter.all_sites() if site.kind == "routed")
    batches = []
    for index in range(2):
        ids = torch.arange(1, 49).roll(7 * index).reshape(2, 24)
        calls = capture_calls(adapter.model, adapter.blocks, {"input_ids": ids})
        store = ActivationStore(WaitingStates(1 << 30, Path()))
        for number in range(block):
            store.advance(0, number, calls[number], adapter.blocks[number])
        call = store.enter(0, block, calls[block])
        store.advance(0, block, calls[block], adapter.blocks[block])
        batches.append(BlockBatch(call.hidden, store.at(0, "cpu"), call, torch.ones(ids.shape, dtype=torch.bool)))
    sites = adapter.sites(block)
    run = Run(plan={name: GRID for site in sites for name in site.weight_names()}, needs=Needs(offsets=True))
    quantize_sites(adapter, run, sites, lambda unit, weight_EOI: round_to_nearest(weight_EOI, unit.grid, torch.float32))
    return adapter, run, block, batches


@torch.no_grad()
def reference_error(adapter: Adapter, block: int, batches: list[BlockBatch]) -> float:
    """Mean of |output - original|^2 / |original|^2 over tokens and streams, of the block as it is, token by token."""
    errors = []
    for batch in batches:
        output = adapter.blocks[block](batch.hidden_BTD, *batch.call.args, **batch.call.kwargs)
        output_BTD = output[0] if isinstance(output, tuple) else output
        for place in batch.keep_BT.nonzero().tolist():
            # Some families carry several streams of hidden states: [B, T, streams, D].
            found, wanted = (each_BTD[tuple(place)].double() for each_BTD in (output_BTD, batch.original_BTD))
            errors.append(float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()))
    return sum(errors) / len(errors)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
@pytest.mark.parametrize("level_rate", [0.05, 0.9], ids=["steps that help", "steps that destroy"])
def test_no_family_is_worse_for_it_than_rounded_to_nearest(family: str, level_rate: float) -> None:
    adapter, run, block, batches = solved(family)
    rounded = dict(run.quantized)
    first = reference_error(adapter, block, batches)
    before, after = tune_block(
        adapter, run, block, batches, partial(learn, spec=LearnedSpec(num_steps=3, level_rate=level_rate))
    )
    left = reference_error(adapter, block, batches)
    assert before == pytest.approx(first, rel=1e-4)
    assert left == pytest.approx(min(before, after), rel=1e-4)
    assert (after < before) == (level_rate == 0.05)
    same = all(
        torch.equal(weight.codes_OI, rounded[name].codes_OI) and torch.equal(weight.scale_OG, rounded[name].scale_OG)
        for name, weight in run.quantized.items()
    )
    assert same == (level_rate == 0.9)
    assert all(weight.codes_OI.unique().numel() > 2 for weight in run.quantized.values())


def test_a_block_that_is_not_better_for_it_stays_as_it_was() -> None:
    adapter, run, block, batches = solved("qwen2_moe")
    solution = {name: weight.codes_OI.clone() for name, weight in run.quantized.items()}
    weights = {site: adapter.get_weight(site) for site in adapter.sites(block)}
    before, after = tune_block(
        adapter, run, block, batches, partial(learn, spec=LearnedSpec(num_steps=3, level_rate=0.9, scale_rate=0.9))
    )
    assert after > before  # steps of that size destroy the block
    assert all(torch.equal(codes_OI, run.quantized[name].codes_OI) for name, codes_OI in solution.items())
    assert all(torch.equal(weight_EOI, adapter.get_weight(site)) for site, weight_EOI in weights.items())


def test_padding_has_no_say() -> None:
    results = []
    for value in (0.0, 1e3):
        adapter, run, block, batches = solved("mixtral")
        for batch in batches:
            batch.keep_BT[:, 20:] = False
            batch.original_BTD[:, 20:] += value
        tune_block(adapter, run, block, batches, partial(learn, spec=LearnedSpec(num_steps=5, level_rate=0.05)))
        results.append({name: weight.codes_OI for name, weight in run.quantized.items()})
    assert all(torch.equal(codes_OI, results[1][name]) for name, codes_OI in results[0].items())


@pytest.mark.parametrize("softness", [0.0, 0.33])
def test_the_errors_are_those_of_the_model_before_and_after(softness: float) -> None:
    adapter, run, block, batches = solved("deepseek_v3")
    first = reference_error(adapter, block, batches)
    before, after = tune_block(
        adapter, run, block, batches, partial(learn, spec=LearnedSpec(num_steps=20, level_rate=0.05, softness=softness))
    )
    assert before == pytest.approx(first, rel=1e-4)
    assert after == pytest.approx(reference_error(adapter, block, batches), rel=1e-4)
    assert after < before
