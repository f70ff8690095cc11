"""HQQ: the proximal step minimises what it should, groups are never worse than where they started."""

import pytest
import torch
from torch import Tensor

from moeq.quant.grid import QParams, choose_qparams, dequantize, quantize
from moeq.quant.hqq import BETA, BETA_GROWTH, STEPS, half_quadratic, shrink
from moeq.quant.kinds import Kind
from moeq.quant.spec import GridSpec

WEIGHT_EOI = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) ** 3 / 50


def group_errors(qparams: QParams, grid: GridSpec, norm: float) -> Tensor:
    codes_EOI = quantize(WEIGHT_EOI, qparams, grid)
    real_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, grid.bits)
    return (real_EOI - WEIGHT_EOI).abs().pow(norm).unflatten(-1, (qparams.scale_EOG.shape[-1], -1)).sum(-1)


def reference_group(weights: list[float], scale: float, zero: float, bits: int, norm: float) -> tuple[float, float]:
    """The iteration on one asymmetric group, one weight at a time."""
    top, size = 2**bits - 1, max(abs(w) for w in weights)
    best, found = float("inf"), (scale, zero)
    for step in range(STEPS + 1):
        codes = [min(max(round(w / scale) + zero, 0), top) for w in weights]
        errors = [(w - scale * (q - zero)) / size for w, q in zip(weights, codes, strict=True)]
        total = sum(abs(e) ** norm for e in errors)
        if total < best * (1 - 1e-9):
            best, found = total, (scale, zero)
        targets = []
        for w, e in zip(weights, errors, strict=True):
            kept = max(0.0, abs(e) - abs(e) ** (norm - 1) / (BETA * BETA_GROWTH**step)) if e else 0.0
            targets.append(w - size * (kept if e > 0 else -kept))
        levels = [q - zero for q in codes]
        scale = sum(t * v for t, v in zip(targets, levels, strict=True)) / sum(v * v for v in levels)
        zero = min(max(round(sum(q - t / scale for q, t in zip(codes, targets, strict=True)) / len(codes)), 0), top)
    return found


def test_scales_and_zero_points_are_those_of_a_loop_over_weights() -> None:
    grid = GridSpec(3, 16, clip_search=False)
    start = choose_qparams(WEIGHT_EOI, grid, torch.float32)
    found = half_quadratic(WEIGHT_EOI, grid, torch.float32)
    assert start.zero_point_EOG is not None
    assert found.zero_point_EOG is not None
    moved = 0
    for e, o, g in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(4)).tolist():
        weights = WEIGHT_EOI[e, o, 16 * g : 16 * g + 16].tolist()
        scale, zero = reference_group(
            weights, float(start.scale_EOG[e, o, g]), float(start.zero_point_EOG[e, o, g]), 3, 0.7
        )
        assert float(found.scale_EOG[e, o, g]) == pytest.approx(scale, rel=1e-4)
        assert float(found.zero_point_EOG[e, o, g]) == zero
        moved += scale != float(start.scale_EOG[e, o, g])
    assert moved > 24, "most groups have to move"


@pytest.mark.parametrize(("symmetric", "kind"), [(True, "uniform"), (False, "uniform"), (True, "full_range")])
@pytest.mark.parametrize("clip_search", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_group_is_worse_than_its_start(dtype: torch.dtype, clip_search: bool, symmetric: bool, kind: Kind) -> None:
    grid = GridSpec(3, 16, symmetric, clip_search, kind)
    before = group_errors(choose_qparams(WEIGHT_EOI, grid, dtype), grid, 0.7)
    after = group_errors(half_quadratic(WEIGHT_EOI, grid, dtype), grid, 0.7)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < (0.99 if kind == "uniform" else 0.999) * before.sum()


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_the_proximal_step_shrinks_small_errors_to_zero_and_keeps_large_ones(norm: float) -> None:
    error = torch.linspace(-3, 3, 61, dtype=torch.float64)
    shrunk = shrink(error, 10.0, norm)
    threshold = 0.1 ** (1 / (2 - norm))
    assert (shrunk[error.abs() < threshold] == 0).all()
    assert shrunk[30] == 0
    large = error.abs() > threshold
    assert (shrunk[large].sign() == error[large].sign()).all()
    torch.testing.assert_close(shrunk[large].abs(), error[large].abs() - error[large].abs() ** (norm - 1) / 10)


def test_groups_of_zeros_and_tiny_weights_keep_valid_scales() -> None:
    weight_EOI = torch.zeros(1, 2, 32)
    weight_EOI[0, 1] = 1e-30
    qparams = half_quadratic(weight_EOI, GridSpec(3, 16), torch.float16)
    assert qparams.scale_EOG.isfinite().all()
    assert (qparams.scale_EOG > 0).all()


@pytest.mark.parametrize("norm", [0.0, 1.5])
def test_a_norm_out_of_range_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=r"norm .* above 0 and at most 1"):
        half_quadratic(WEIGHT_EOI, GridSpec(3, 16), torch.float32, norm)
