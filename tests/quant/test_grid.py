"""Grids: round trips, ranges, storage of scales, clip search."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.quant import ranges
from moeq.quant.grid import choose_qparams, dequantize, dequantize_weight, quantize
from moeq.quant.ranges import CLIP_NORM
from moeq.quant.spec import GridSpec, QuantizedWeight


def weights(seed: int = 0, shape: tuple[int, int, int] = (2, 6, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 0.02


def round_trip(weight_EOI: Tensor, grid: GridSpec, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    qparams = choose_qparams(weight_EOI, grid, dtype)
    codes_EOI = quantize(weight_EOI, qparams, grid)
    assert codes_EOI.dtype == torch.uint8
    assert int(codes_EOI.max()) < 2**grid.bits
    return dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, grid.bits)


def reference_code(value: float, scale: float, zero_point: int, bits: int) -> int:
    return min(max(round(value / scale) + zero_point, 0), 2**bits - 1)


def clip_norm_error(weight_EOI: Tensor, rounded_EOI: Tensor, groups: int) -> Tensor:
    error_EOI = (weight_EOI - rounded_EOI).abs().double() ** CLIP_NORM
    return error_EOI.unflatten(-1, (groups, -1)).sum(-1)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_round_trip_error_is_at_most_half_a_scale(bits: int, symmetric: bool, group_size: int | None) -> None:
    weight_EOI = weights()
    grid = GridSpec(bits, group_size, symmetric, clip_search=False)
    qparams = choose_qparams(weight_EOI, grid, torch.float32)
    scale_EOI = qparams.scale_EOG.repeat_interleave(32 // qparams.scale_EOG.shape[-1], dim=-1)
    error_EOI = (round_trip(weight_EOI, grid, torch.float32) - weight_EOI).abs()
    # An asymmetric grid can lose another half level at its ends, to the rounding of the zero point.
    assert bool((error_EOI <= scale_EOI * (0.5001 if symmetric else 1.0001)).all())
    assert (qparams.zero_point_EOG is None) == symmetric


@pytest.mark.parametrize("group_size", [None, 8])
def test_one_bit_keeps_signs_and_the_mean_magnitude_of_a_group(group_size: int | None) -> None:
    weight_EOI = weights()
    weight_EOI[0, 0, :32] = 0.0
    real_EOI = round_trip(weight_EOI, GridSpec(1, group_size, symmetric=True), torch.float32)
    for row_I, real_I in zip(weight_EOI.flatten(0, 1), real_EOI.flatten(0, 1), strict=True):
        for start in range(0, 32, group_size or 32):
            part_S = row_I[start : start + (group_size or 32)]
            size = float(part_S.abs().double().mean())
            expected = [size if w > 0 else -size for w in part_S]
            if size:
                assert real_I[start : start + len(part_S)].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"symmetric": True, "kind": "full_range"}])
def test_one_bit_with_zero_points_or_scales_of_either_sign_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits \(1\) leave two levels.*set symmetric: true and grid: uniform"):
        GridSpec(1, 64, **settings)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_a_scalar_loop(symmetric: bool) -> None:
    weight_EOI = weights(shape=(1, 3, 16))
    grid = GridSpec(3, 8, symmetric, clip_search=True)
    qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
    codes_EOI = quantize(weight_EOI, qparams, grid)
    for row in range(3):
        for column in range(16):
            zero = 4 if qparams.zero_point_EOG is None else int(qparams.zero_point_EOG[0, row, column // 8])
            scale = float(qparams.scale_EOG[0, row, column // 8])
            assert codes_EOI[0, row, column] == reference_code(float(weight_EOI[0, row, column]), scale, zero, 3)


@pytest.mark.parametrize("clip_search", [True, False])
def test_quantizing_a_dequantized_weight_gives_the_same_codes(clip_search: bool) -> None:
    grid = GridSpec(4, 8, False, clip_search)
    weight_EOI = weights()
    qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
    codes_EOI = quantize(weight_EOI, qparams, grid)
    rounded_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, 4)
    assert torch.equal(quantize(rounded_EOI, qparams, grid), codes_EOI)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clip_search_is_never_worse_than_min_max_in_its_norm(
    bits: int, symmetric: bool, group_size: int | None
) -> None:
    weight_EOI = weights(bits, (3, 40, 32))
    groups = 32 // (group_size or 32)
    errors = [
        clip_norm_error(weight_EOI, round_trip(weight_EOI, GridSpec(bits, group_size, symmetric, clip)), groups)
        for clip in (True, False)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-30).all())
    assert bits == 8 or errors[0].sum() < errors[1].sum()  # 8 bits: clipping 1% already costs more than it gains


def test_clip_search_finds_the_best_of_all_candidates() -> None:
    weight_EOI = weights(1, (1, 5, 16))
    grid = GridSpec(3, None, True, clip_search=True)
    found_EOG = clip_norm_error(weight_EOI, round_trip(weight_EOI, grid, torch.float32), 1)
    for row in range(5):
        largest = float(weight_EOI[0, row].abs().max())
        candidates = [(1.0 - step / 100) * largest / 3 for step in range(80)]
        errors = [
            sum(abs(min(max(round(w / s), -4), 3) * s - w) ** CLIP_NORM for w in weight_EOI[0, row].tolist())
            for s in candidates
        ]
        assert float(found_EOG[0, row, 0]) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_that_leave_the_search_early_lose_nothing(
    bits: int, symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = weights(bits, (1, 64, 64))
    stacks = [normal, normal**3 * 100, normal.abs(), -normal.abs() - 0.02, normal * 1e-36, normal * (normal > 0.04)]
    grid = GridSpec(bits, 32, symmetric, clip_search=True)
    evaluated = []
    clip_error = ranges._clip_error
    monkeypatch.setattr(ranges, "_clip_error", lambda *args: evaluated.append(len(args[0])) or clip_error(*args))
    found = [choose_qparams(weight_EOI, grid, dtype) for weight_EOI in stacks]
    groups = 128 * len(stacks)
    assert sum(evaluated) < (0.9 if bits > 2 else 1.0) * groups * ranges.CLIP_STEPS
    monkeypatch.setattr(ranges, "_cut_off", lambda rows_NS, *_: torch.full((len(rows_NS),), -1.0))
    for weight_EOI, early in zip(stacks, found, strict=True):
        late = choose_qparams(weight_EOI, grid, dtype)
        assert torch.equal(early.scale_EOG, late.scale_EOG)
        assert symmetric or torch.equal(early.zero_point_EOG, late.zero_point_EOG)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_clip_search_does_not_depend_on_the_scale_of_the_weights(scale: float) -> None:
    grid = GridSpec(3, 8, True, clip_search=True)
    expected_EOG = choose_qparams(weights(), grid, torch.float32).scale_EOG
    torch.testing.assert_close(choose_qparams(weights() * scale, grid, torch.float32).scale_EOG / scale, expected_EOG)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-7, 3e38])
def test_scales_are_normal_positive_and_finite(size: float, dtype: torch.dtype, symmetric: bool) -> None:
    weight_EOI = torch.tensor([[[-size, size, 0.0, size]]])
    for clip in (True, False):
        scale_EOG = choose_qparams(weight_EOI, GridSpec(4, None, symmetric, clip), dtype).scale_EOG
        assert scale_EOG.dtype == dtype
        assert bool(torch.isfinite(scale_EOG).all())
        assert bool((scale_EOG >= torch.finfo(dtype).tiny).all())


def test_an_all_zero_group_stays_exactly_zero() -> None:
    for symmetric in (True, False):
        assert not round_trip(torch.zeros(1, 2, 16), GridSpec(3, 8, symmetric)).any()


def test_an_asymmetric_range_always_contains_zero() -> None:
    weight_EOI = torch.linspace(5.0, 6.0, 16).view(1, 1, 16)
    qparams = choose_qparams(torch.cat([weight_EOI, -weight_EOI], 1), GridSpec(4, None, False, False), torch.float32)
    assert qparams.zero_point_EOG is not None
    assert qparams.zero_point_EOG.flatten().tolist() == [0, 15]


def test_the_lowest_symmetric_level_is_used_for_clipped_values() -> None:
    grid = GridSpec(3, None, True, clip_search=False)
    qparams = choose_qparams(torch.tensor([[[-3.0, 3.0]]]), grid, torch.float32)
    assert quantize(torch.tensor([[[-9.0, 9.0]]]), qparams, grid).tolist() == [[[0, 7]]]


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = GridSpec(3, 8, False, clip_search=True)
    expected = choose_qparams(weights(), grid, torch.bfloat16)
    monkeypatch.setattr("moeq.quant.grid.CPU_CHUNK", 64)
    chunked = choose_qparams(weights(), grid, torch.bfloat16)
    assert torch.equal(chunked.scale_EOG, expected.scale_EOG)
    assert chunked.zero_point_EOG is not None
    assert expected.zero_point_EOG is not None
    assert torch.equal(chunked.zero_point_EOG, expected.zero_point_EOG)


def test_a_quantized_weight_is_dequantized_in_float32_and_cast_once() -> None:
    grid = GridSpec(4, 8, False)
    weight_EOI = weights()
    qparams = choose_qparams(weight_EOI, grid, torch.bfloat16)
    assert qparams.zero_point_EOG is not None
    codes_EOI = quantize(weight_EOI, qparams, grid)
    packed = QuantizedWeight(codes_EOI[1], qparams.scale_EOG[1], qparams.zero_point_EOG[1], 4, 8)
    expected = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, 4)[1].to(torch.bfloat16)
    assert torch.equal(dequantize_weight(packed, torch.bfloat16), expected)


def test_a_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_size \(12\) must divide in_features \(32\)"):
        choose_qparams(weights(), GridSpec(4, 12), torch.float32)
