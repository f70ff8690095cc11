"""AWQ: error and search against loops, never worse than no scale, exact invariances, division of quantized rows."""

import pytest
import torch
from torch import Tensor

from moeq.quant.awq import (
    NUM_ALPHAS,
    Reader,
    candidate_scales,
    divide_rows,
    round_scaled,
    scale_problem,
    scaled_error,
    search_scale,
)
from moeq.quant.grid import dequantize, dequantize_weight
from moeq.quant.kinds import Kind
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, QuantizedWeight


def problem(seed: int = 0, rows: int = 6, width: int = 16, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and inputs [T, I] of which two channels are large."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, width, generator=generator)
    x_TI[:, 3] *= 30
    x_TI[:, 9] *= 8
    return torch.randn(rows, width, generator=generator), x_TI


def reader_of(weight_OI: Tensor, x_TI: Tensor, grid: GridSpec) -> Reader:
    return Reader(weight_OI, x_TI.mT @ x_TI / len(x_TI), float(len(x_TI)), grid)


def reference_round(weight_OI: Tensor, grid: GridSpec) -> Tensor:
    """Min-max rounding, one group and one weight at a time."""
    out, size, top = weight_OI.clone(), grid.group_size or weight_OI.shape[1], 2**grid.bits - 1
    for o, row in enumerate(weight_OI.tolist()):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min(0.0, *group), max(0.0, *group)
            scale = (high - low) / top
            zero = round(-low / scale)
            for i, value in enumerate(group):
                out[o, start + i] = (min(max(round(value / scale) + zero, 0), top) - zero) * scale
    return out


def reference_error(weight_OI: Tensor, x_TI: Tensor, scale_I: Tensor, grid: GridSpec) -> float:
    """Squared change of every output, summed over tokens, with the inputs really divided."""
    rounded_OI = reference_round(weight_OI * scale_I, grid)
    return sum(
        float(((rounded_OI[o] * (x_I / scale_I)).sum() - (weight_OI[o] * x_I).sum()) ** 2)
        for x_I in x_TI
        for o in range(len(weight_OI))
    )


@pytest.mark.parametrize("group_size", [8, None])
def test_the_metric_is_the_change_of_the_outputs_over_all_tokens(group_size: int | None) -> None:
    weight_OI, x_TI = problem()
    grid = GridSpec(3, group_size, clip_search=False)
    scale_I = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    reader = reader_of(weight_OI, x_TI, grid)
    error = reader.tokens * float(scaled_error(reader, scale_I, torch.float32))
    assert error == pytest.approx(reference_error(weight_OI, x_TI, scale_I, grid), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_the_best_alpha_of_a_loop_over_alphas(seed: int) -> None:
    weight_OI, x_TI = problem(seed)
    second_OI, few_TI = problem(seed + 10, tokens=7)
    grid = GridSpec(3, 8, clip_search=False)
    rms_I = torch.cat([x_TI, few_TI]).square().sum(0).sqrt()
    best, best_error = torch.ones(16), float("inf")
    for step in range(20):
        scale_I = rms_I ** (step / 20)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        error = reference_error(weight_OI, x_TI, scale_I, grid) + reference_error(second_OI, few_TI, scale_I, grid)
        if error < best_error:
            best, best_error = scale_I, error
    readers = [reader_of(weight_OI, x_TI, grid), reader_of(second_OI, few_TI, grid)]
    torch.testing.assert_close(search_scale(readers, torch.float32), best)
    assert best.std() > 0.1, "the example has to need a scale"


@pytest.mark.parametrize("clip_search", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_is_never_above_that_without_a_scale(bits: int, clip_search: bool) -> None:
    gains = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight_OI = torch.randn(8, 32, generator=generator)
        x_TI = torch.randn(50, 32, generator=generator) * torch.randn(32, generator=generator).exp()
        reader = reader_of(weight_OI, x_TI, GridSpec(bits, 16, clip_search=clip_search))
        scale_1I = search_scale([reader], torch.float32)[None]
        hessian_1II = reader.hessian_II[None]
        error, plain = (
            float(round_scaled(weight_OI[None], hessian_1II, s_1I, reader.grid, torch.float32).relative_error_E)
            for s_1I in (scale_1I, torch.ones_like(scale_1I))
        )
        assert error <= plain
        gains.append(1 - error / plain)
    assert max(gains) > 0.1, "the scale has to help somewhere"


def test_scaled_weights_on_scaled_inputs_have_the_same_outputs_and_the_same_relative_error() -> None:
    weight_OI, x_TI = problem()
    hessian_1II = (x_TI.mT @ x_TI)[None]
    scale_1I = torch.exp2(torch.randint(-3, 4, (1, 16), generator=torch.Generator().manual_seed(2)).float())
    scaled_1OI, scaled_1II = scale_problem(weight_OI[None], hessian_1II, scale_1I)
    assert torch.equal((x_TI / scale_1I) @ scaled_1OI[0].mT, x_TI @ weight_OI.mT)  # powers of two: bit for bit
    torch.testing.assert_close(scaled_1II[0], (x_TI / scale_1I).mT @ (x_TI / scale_1I))
    grid = GridSpec(3, 8, clip_search=False)
    solution = round_scaled(weight_OI[None], hessian_1II, scale_1I, grid, torch.float32)
    noise_TO = (
        x_TI @ weight_OI.mT
        - (x_TI / scale_1I) @ dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, 3)[0].mT
    )
    share = float(noise_TO.square().sum() / (x_TI @ weight_OI.mT).square().sum())
    assert float(solution.relative_error_E) == pytest.approx(share, rel=1e-4)


def test_the_unit_of_the_activations_and_a_power_of_two_in_the_weights_do_not_matter() -> None:
    weight_OI, x_TI = problem()
    grid = GridSpec(3, 8)
    scale_I = search_scale([reader_of(weight_OI, x_TI, grid)], torch.bfloat16)
    assert torch.equal(search_scale([reader_of(weight_OI, 4 * x_TI, grid)], torch.bfloat16), scale_I)
    assert torch.equal(search_scale([reader_of(8 * weight_OI, x_TI, grid)], torch.bfloat16), scale_I)


def test_the_first_candidate_is_no_scale_and_extremes_are_reciprocal() -> None:
    scale_CJ = candidate_scales(torch.tensor([1.0, 5.0, 0.0, 100.0]))
    assert scale_CJ.shape == (NUM_ALPHAS, 4)
    assert (scale_CJ[0] == 1).all()
    assert (scale_CJ[:, 2] == 1).all(), "a channel without input"
    torch.testing.assert_close(scale_CJ[:, 3] * scale_CJ[:, 0], torch.ones(NUM_ALPHAS))
    torch.testing.assert_close(scale_CJ[10, 3] / scale_CJ[10, 0], torch.tensor(10.0))
    assert (candidate_scales(torch.zeros(3)) == 1).all()


def test_in_features_that_share_a_channel_get_one_scale() -> None:
    weight_OI, x_TI = problem()
    channel_I = torch.arange(16) % 8
    scale_J = search_scale([reader_of(weight_OI, x_TI, GridSpec(3, None))], torch.float32, channel_I)
    assert scale_J.shape == (8,)
    assert scale_J[3] == scale_J.max()


def quantized(group_size: int | None, dtype: torch.dtype, kind: Kind = "uniform") -> QuantizedWeight:
    weight_1OI = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    grid = GridSpec(4, group_size, kind == "full_range", kind=kind)
    return round_to_nearest(weight_1OI, grid, dtype).expert(0, grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group_size", "kind"), [(8, "uniform"), (None, "uniform"), (8, "full_range")])
def test_divided_rows_times_the_applied_scale_are_the_rows(
    group_size: int | None, kind: Kind, dtype: torch.dtype
) -> None:
    weight = quantized(group_size, dtype, kind)
    row_J, scale_J = torch.tensor([4, 1, 0]), torch.tensor([3.0, 0.7, 11.0])
    divided, applied_J = divide_rows(weight, row_J, scale_J)
    assert divided.scale_OG.dtype == dtype
    assert divided.codes_OI is weight.codes_OI
    before_OI, after_OI = (dequantize_weight(w, torch.float32) for w in (weight, divided))
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(applied_J, scale_J, rtol=epsilon, atol=0)
    tolerance = 1e-6 if group_size is None else 2 * epsilon
    torch.testing.assert_close(after_OI[row_J] * applied_J[:, None], before_OI[row_J], rtol=tolerance, atol=0)
    assert torch.equal(after_OI[[2, 3, 5]], before_OI[[2, 3, 5]])


@pytest.mark.parametrize("kind", ["uniform", "full_range"])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_a_division_that_would_leave_the_range_of_the_scales_is_limited(scale: float, kind: Kind) -> None:
    weight = quantized(8, torch.float16, kind)
    divided, applied_J = divide_rows(weight, torch.arange(6), torch.full((6,), scale))
    assert divided.scale_OG.isfinite().all()
    assert (divided.scale_OG.float().abs() >= torch.finfo(torch.float16).tiny).all()
    assert torch.equal(divided.scale_OG.sign(), weight.scale_OG.sign())
    before_OI, after_OI = (dequantize_weight(w, torch.float32) for w in (weight, divided))
    torch.testing.assert_close(after_OI * applied_J[:, None], before_OI, rtol=2e-3, atol=0)
