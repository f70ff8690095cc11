"""Weights that are drawn for timing."""

import pytest
import torch

from benchmarks.speed.drawn import DEVIATION, drawn_weight
from moeq.checkpoint.packed_weight import PackedFormat, dequantize_codes, packed_tensors, unpacked_weight
from moeq.quant.spec import GridSpec


@pytest.mark.parametrize(
    "grid",
    [
        GridSpec(2, 64, symmetric=True), GridSpec(4, None, symmetric=False), GridSpec(8, 32, symmetric=True),
        GridSpec.of_kind("q2_k"), GridSpec.of_kind("q3_k"), GridSpec.of_kind("q4_k"),
    ],
    ids=lambda grid: grid.label,
)  # fmt: skip
def test_they_are_on_their_grid_and_keep_the_size_of_activations(grid: GridSpec) -> None:
    torch.manual_seed(0)
    packed = PackedFormat.of(grid)
    weight = drawn_weight(64, 512, packed)
    values_OI = dequantize_codes(weight)
    assert values_OI.dtype == torch.bfloat16
    assert values_OI.float().pow(2).mean().sqrt() == pytest.approx(DEVIATION, rel=0.35)
    assert abs(float(values_OI.float().mean())) < 0.6 * DEVIATION  # 2 bits have no level in the middle
    stored = unpacked_weight(packed_tensors(weight), packed, (64, 512), torch.bfloat16)
    assert torch.equal(dequantize_codes(stored), values_OI)
