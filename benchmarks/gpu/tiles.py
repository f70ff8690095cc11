"""Which tiles of the packed kernel are fastest on this card: the neighbours of each entry of the table.

Shapes of Qwen3-30B-A3B's gate and up projections; every candidate is compiled first, which takes seconds each, so this
step is asked for by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import device_seconds
from benchmarks.gpu.products import dense_experts, packed_experts
from benchmarks.gpu.steps import Setting
from benchmarks.lab.tables import Row
from moeq.checkpoint.gpu_forms import product_on
from moeq.checkpoint.gpu_forward import stacks_of
from moeq.kernels.packed_products import PackedStack
from moeq.kernels.packed_tiles import TILES, Tile

# Of a block of 128 experts with 8 per token, the tokens for which an entry is the one that is used.
TOKENS = (16, 256, 640, 1280, 4096)


@torch.no_grad()
def tiles(setting: Setting) -> Iterator[Row]:
    """The fastest tile for each entry of the table, at 4 bits."""
    packed = packed_experts(dense_experts(setting), (4,))
    stacks = stacks_of(packed)
    assert stacks is not None
    ((_, stack),) = stacks.by_leaf["up_proj"]
    calls = 1 if setting.quick else 16
    for (bound, entry), tokens in zip(TILES, TOKENS, strict=True):
        each = max(1, tokens * 8 // len(packed) // (64 if setting.quick else 1))
        starts = torch.arange(len(packed) + 1, dtype=torch.int32, device=setting.device) * each
        bounds_E2 = torch.stack([starts[:-1], starts[1:]], 1)
        x_NI = torch.randn(each * len(packed), stack.in_features, device=setting.device).bfloat16()
        out_NO = x_NI.new_empty(len(x_NI), stack.out_features)
        work = partial(run, x_NI, bounds_E2, stack, out_NO)
        candidates = neighbours(entry) if setting.device.type == "cuda" else [entry]
        times = {tile: device_seconds(partial(work, tile), setting.device, calls) for tile in candidates}
        best = min(times, key=lambda tile: times[tile])
        yield {
            "what": f"up to {bound} rows",
            "us": 1e6 * times[best],
            "table_us": 1e6 * times[entry],
            "tile": str(best),
        }


def run(x_NI: Tensor, bounds_E2: Tensor, stack: PackedStack, out_NO: Tensor, tile: Tile, _: int = 0) -> None:
    """The kernel with a tile; its twin has none."""
    product = product_on(x_NI.device)
    product(x_NI, None, bounds_E2, stack, out_NO, *([tile] if x_NI.is_cuda else []))  # type: ignore[arg-type, call-arg]


def neighbours(tile: Tile) -> list[Tile]:
    """The tile, and those that differ in one number."""
    changes = [
        {"outputs": tile.outputs // 2}, {"outputs": tile.outputs * 2}, {"inner": tile.inner // 2},
        {"inner": tile.inner * 2}, {"warps": 8 if tile.warps == 4 else 4}, {"stages": tile.stages - 1},
        {"stages": tile.stages + 1},
    ]  # fmt: skip
    found = [tile, *(replace(tile, **change) for change in changes)]
    return [each for each in found if each.outputs >= 64 and each.inner >= 32]
