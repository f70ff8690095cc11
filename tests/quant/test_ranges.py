"""Full-range grids: which weight gets which code, the search over both signs, what scales are stored."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.quant import ranges
from moeq.quant.carrier import FORMATS, choose_carrier
from moeq.quant.grid import choose_qparams, dequantize, quantize
from moeq.quant.ranges import CLIP_NORM, CLIP_STEPS
from moeq.quant.spec import GridSpec, choose_grid

WEIGHT_EOI = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0)) ** 3 * 0.02


def full_range(bits: int, group_size: int | None = 16, *, clip_search: bool = True) -> GridSpec:
    return GridSpec(bits, group_size, symmetric=True, clip_search=clip_search, kind="full_range")


def errors(weight_EOI: Tensor, grid: GridSpec, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Sum of |real - weight|^2.4 of every group, [E, O, G]."""
    qparams = choose_qparams(weight_EOI, grid, dtype)
    real_EOI = dequantize(quantize(weight_EOI, qparams, grid), qparams.scale_EOG, None, grid.bits)
    return (
        ((real_EOI - weight_EOI).abs().double() ** CLIP_NORM).unflatten(-1, (qparams.scale_EOG.shape[-1], -1)).sum(-1)
    )


def reference_error(group: list[float], scale: float, bits: int) -> float:
    half = 2 ** (bits - 1)
    return sum(abs(min(max(round(w / scale), -half), half - 1) * scale - w) ** CLIP_NORM for w in group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weight_of_a_group_has_code_0_and_its_own_value(bits: int) -> None:
    grid = full_range(bits, clip_search=False)
    qparams = choose_qparams(WEIGHT_EOI, grid, torch.float32)
    codes_EOGS = quantize(WEIGHT_EOI, qparams, grid).view(2, 12, 2, 16)
    groups_EOGS = WEIGHT_EOI.view(2, 12, 2, 16)
    largest_EOG1 = groups_EOGS.abs().argmax(-1, keepdim=True)
    assert not codes_EOGS.gather(-1, largest_EOG1).any()
    real_EOGS = dequantize(codes_EOGS.flatten(2), qparams.scale_EOG, None, bits).view_as(groups_EOGS)
    extreme_EOG1 = groups_EOGS.gather(-1, largest_EOG1)
    torch.testing.assert_close(real_EOGS.gather(-1, largest_EOG1), extreme_EOG1)
    assert torch.equal(qparams.scale_EOG.sign(), -extreme_EOG1.squeeze(-1).sign())
    assert qparams.zero_point_EOG is None


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.float32), (3, torch.float32), (4, torch.bfloat16)])
def test_the_search_finds_the_best_of_both_signs_and_the_range_from_end_to_end(bits: int, dtype: torch.dtype) -> None:
    grid = full_range(bits, 16)
    found_EOG = errors(WEIGHT_EOI, grid, dtype)
    signs = set()
    for e, o, g in product(range(2), range(12), range(2)):
        group = WEIGHT_EOI[e, o, 16 * g : 16 * g + 16].tolist()
        extreme = max(group, key=abs)
        sizes = [(1.0 - step / 100) * abs(extreme) / (2 ** (bits - 1) - 1) for step in range(CLIP_STEPS)]
        scales = [-extreme / 2 ** (bits - 1), *(sign * size for sign in (1, -1) for size in sizes)]
        stored = [float(torch.tensor(scale).to(dtype)) for scale in scales]
        best = min((reference_error(group, scale, bits), scale) for scale in stored)
        assert float(found_EOG[e, o, g]) == pytest.approx(best[0], rel=1e-4)
        signs.add(best[1] * extreme < 0)
    assert bits > 2 or signs == {True, False}, "not always is the sign that of the largest weight"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_is_worse_than_on_the_symmetric_grid_or_from_end_to_end(bits: int) -> None:
    grid = full_range(bits)
    found, ordinary = errors(WEIGHT_EOI, grid), errors(WEIGHT_EOI, replace(grid, kind="uniform"))
    assert (found <= ordinary * (1 + 1e-5)).all()
    assert (found <= errors(WEIGHT_EOI, replace(grid, clip_search=False)) * (1 + 1e-5)).all()
    assert found.sum() < 0.95 * ordinary.sum()


@pytest.mark.parametrize("clip_search", [True, False])
def test_negated_weights_have_the_same_codes_on_negated_scales(clip_search: bool) -> None:
    grid = full_range(3, clip_search=clip_search)
    one, other = (choose_qparams(weight_EOI, grid, torch.bfloat16) for weight_EOI in (WEIGHT_EOI, -WEIGHT_EOI))
    assert torch.equal(one.scale_EOG, -other.scale_EOG)
    assert torch.equal(quantize(WEIGHT_EOI, one, grid), quantize(-WEIGHT_EOI, other, grid))


def test_groups_that_leave_the_search_early_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_EOI = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)) ** 3
    early = choose_qparams(weight_EOI, full_range(4, 32), torch.bfloat16)
    monkeypatch.setattr(ranges, "_cut_off", lambda rows_NS, *_: torch.full((len(rows_NS),), -1.0))
    assert torch.equal(choose_qparams(weight_EOI, full_range(4, 32), torch.bfloat16).scale_EOG, early.scale_EOG)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-7, 3e38])
def test_scales_are_normal_and_finite(size: float, dtype: torch.dtype) -> None:
    weight_EOI = torch.tensor([[[-size / 2, size, 0.0, size]]])
    for clip_search in (True, False):
        scale = choose_qparams(weight_EOI, full_range(4, None, clip_search=clip_search), dtype).scale_EOG
        assert scale.dtype == dtype
        assert bool(scale.isfinite().all())
        assert bool((scale.abs() >= torch.finfo(dtype).tiny).all())
        assert float(scale) == 1.0 or float(scale) < 0


def test_a_full_range_grid_has_no_zero_points_and_is_stored_as_a_uniform_one() -> None:
    grid = choose_grid("full_range", 3, 64, symmetric=False, clip_search=True)
    assert grid == GridSpec(3, 64, symmetric=True, kind="full_range")
    assert PackedFormat.of(grid) == PackedFormat(3, 64, symmetric=True)
    assert grid.label == "3 bits, groups of 64, full-range symmetric"
    for name in FORMATS:
        assert choose_carrier(name, grid, 128) == choose_carrier(name, replace(grid, kind="uniform"), 128)
    with pytest.raises(ValueError, match="full_range has no zero points"):
        GridSpec(4, 64, symmetric=False, kind="full_range")
