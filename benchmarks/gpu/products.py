"""The experts of a block on packed weights against ``grouped_mm`` on bfloat16, in the shapes of Qwen3-30B-A3B.

Times are of the device alone (a graph of calls that choose other experts each time), beside the floor: the bytes of the
experts that are hit at the rate of a copy, or the operations at the rate of a product, whichever is more.

Shapes: E experts, N tokens, K experts of a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.gpu.clock import copy_rate, device_seconds, product_rate
from benchmarks.gpu.steps import Setting
from benchmarks.lab.tables import Row
from moeq.checkpoint.gpu_forms import KernelForm
from moeq.checkpoint.gpu_forward import forward_by_kernel, stacks_of
from moeq.checkpoint.packed import PackedExpert, PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.models.experts import expert_weight
from moeq.quant.rtn import round_to_nearest

BITS, TOKENS = (4, 3, 2, 8), (1, 4, 16, 512, 4096)


@torch.no_grad()
def products(setting: Setting) -> Iterator[Row]:
    """Every width and number of tokens; mixed widths last."""
    dense = dense_experts(setting)
    tokens = (1, 8) if setting.quick else TOKENS
    inputs = {number: made_inputs(dense.config, number, setting) for number in tokens}
    grouped_mm = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    plain = {number: timed(partial(grouped_mm, dense), given, setting) for number, given in inputs.items()}
    widths = [(bits,) for bits in BITS] + [(2, 4)]
    for bits in widths[:1] + widths[-1:] if setting.quick else widths:
        packed = packed_experts(dense, bits)
        for number, given in inputs.items():
            ours = timed(partial(forward_by_kernel, packed, stacks_of(packed)), given, setting)
            floor = floor_seconds(dense.config, given, sum(bits) / len(bits), setting)
            yield {
                "what": f"{'+'.join(map(str, bits))} bits", "tokens": number, "us": 1e6 * ours,
                "grouped_mm_us": 1e6 * plain[number], "speedup": plain[number] / ours, "floor_us": 1e6 * floor,
                "floor_share": floor / ours,
            }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Of the calls that are timed.

    Attributes:
        hidden: Of every call.
        ids: Chosen experts of each call.
        weights: Of the choices.
    """

    hidden: Tensor
    ids: list[Tensor]
    weights: Tensor


def timed(forward: Callable[..., Tensor], given: Inputs, setting: Setting) -> float:
    """Seconds of one call of some experts."""
    return device_seconds(
        lambda call: forward(given.hidden, given.ids[call], given.weights), setting.device, len(given.ids)
    )


def dense_experts(setting: Setting) -> Any:
    """A module of experts with random weights."""
    sizes = (16, 64, 32, 2) if setting.quick else (128, 2048, 768, 8)
    config = Qwen3MoeConfig(num_experts=sizes[0], hidden_size=sizes[1], moe_intermediate_size=sizes[2],
                            num_experts_per_tok=sizes[3])  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with setting.device:
        experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.02)
    return experts


def packed_experts(dense: Any, bits: tuple[int, ...]) -> PackedExperts:
    """The same, rounded to widths in turn, prepared for the kernel."""
    made = []
    for expert in range(dense.num_experts):
        layers = {leaf: packed_linear(expert_weight(dense, expert, leaf), bits[expert % len(bits)])
                  for leaf in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
        made.append(PackedExpert(**layers))
    return PackedExperts(dense, made)


def packed_linear(weight_OI: Tensor, bits: int) -> PackedLinear:
    """Rounded to nearest in groups of 128, or of fewer."""
    rows, columns = weight_OI.shape
    grid = PackedFormat(bits, min(128, columns), symmetric=False)
    layer = PackedLinear(columns, rows, grid, torch.bfloat16)
    solution = round_to_nearest(weight_OI.unsqueeze(0), replace(grid.spec, clip_search=False), torch.bfloat16)
    layer.form = KernelForm.of(solution.expert(0, grid.spec))
    return layer


def made_inputs(config: Any, number: int, setting: Setting) -> Inputs:
    """So many tokens, whose choices differ from call to call."""
    generator, top_k = torch.Generator().manual_seed(number), config.num_experts_per_tok
    hidden = torch.randn(number, config.hidden_size, generator=generator).bfloat16()
    drawn = [torch.rand(number, config.num_experts, generator=generator) for _ in range(2 if setting.quick else 16)]
    ids = [each.topk(top_k, 1).indices.to(setting.device) for each in drawn]
    weights = torch.full((number, top_k), 1 / top_k, dtype=torch.bfloat16)
    return Inputs(hidden.to(setting.device), ids, weights.to(setting.device))


def floor_seconds(config: Any, given: Inputs, bits: float, setting: Setting) -> float:
    """Bytes of the experts that are hit, and operations; what takes longer."""
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    hit = sum(len(each.unique()) for each in given.ids) / len(given.ids)
    size, num_bytes = (256, 1 << 20) if setting.quick else (4096, 1 << 30)
    reading = hit * weights * (bits + (16 + bits) / 128) / 8 / copy_rate(setting.device, num_bytes)
    operations = 2 * given.ids[0].numel() * weights
    return max(reading, operations / product_rate(torch.bfloat16, setting.device, size))
