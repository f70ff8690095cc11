"""Grids by a table: nearest levels, searched scales, and what solvers make of them, against slow references."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams, dequantize_weight, quantize, real_values
from moeq.quant.kinds import TABLES, Kind
from moeq.quant.ranges import CLIP_NORM
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.quant.tables import DEEPEST, SMALLEST, STEPS, WIDEST, common_exponent
from tests.quant.obq import output_error, problem

KINDS: list[Kind] = [*TABLES]  # type: ignore[list-item]
BF16 = torch.bfloat16
WEIGHT_EOI = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) ** 3 * 0.02


def reference_round(weight: float, scale: float, kind: str) -> float:
    """The nearest of all values of a group."""
    return min((scale * level for level in TABLES[kind].levels), key=lambda value: abs(value - weight))


def reference_error(group: list[float], scale: float, kind: str) -> float:
    return sum(abs(reference_round(w, scale, kind) - w) ** CLIP_NORM for w in group)


def stored(scale: float, kind: str, whole: float) -> float:
    """A scale as the runtime holds it, in bfloat16, too; ``whole`` is the largest magnitude in the weight."""
    if kind == "mxfp4":
        return 2.0 ** round(float(torch.tensor(scale).log2()))
    if kind == "nvfp4":
        top = 2.0 ** math.floor(math.log2(whole / 6))
        held = [top * 2.0**power * eighths / 8 for power in range(-8, 3) for eighths in range(8, 16)]
        return min(held, key=lambda value: abs(value - scale))
    return float(torch.tensor(scale).bfloat16().half())


def quantized(weight_EOI: Tensor, grid: GridSpec) -> tuple[QParams, Tensor]:
    qparams = choose_qparams(weight_EOI, grid, BF16)
    return qparams, real_values(quantize(weight_EOI, qparams, grid), qparams, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_the_nearest_value_of_its_group(kind: Kind) -> None:
    qparams, real_EOI = quantized(WEIGHT_EOI, GridSpec.of_kind(kind))
    for e, o, i in product(range(2), range(6), range(0, 64, 3)):
        group = i // TABLES[kind].group_size
        expected = reference_round(float(WEIGHT_EOI[e, o, i]), float(qparams.scale_EOG[e, o, group]), kind)
        assert float(real_EOI[e, o, i]) == pytest.approx(expected, rel=1e-6)
    weight = round_to_nearest(WEIGHT_EOI, GridSpec.of_kind(kind), BF16).expert(1, GridSpec.of_kind(kind))
    assert weight.kind == kind
    assert torch.equal(dequantize_weight(weight, torch.float32), real_EOI[1])
    assert torch.equal(dequantize_weight(weight.rows(slice(2, 4)), torch.float32), real_EOI[1, 2:4])


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_best_of_a_loop_over_sizes_and_signs(kind: Kind) -> None:
    qparams, real_EOI = quantized(WEIGHT_EOI, GridSpec.of_kind(kind))
    outermost, size = max(map(abs, TABLES[kind].levels)), TABLES[kind].group_size
    for e, o, g in product(range(2), range(6), range(64 // size)):
        part = slice(size * g, size * g + size)
        group = WEIGHT_EOI[e, o, part].tolist()
        tried = [max(map(abs, group)) / outermost * (WIDEST - k * (WIDEST - SMALLEST) / STEPS) for k in range(STEPS)]
        signs, whole = (1, -1) if kind == "iq4_nl" else (1,), float(WEIGHT_EOI[e].abs().max())
        best = min(reference_error(group, sign * stored(s, kind, whole), kind) for s in tried for sign in signs)
        found = float(((real_EOI[e, o, part] - WEIGHT_EOI[e, o, part]).abs().double() ** CLIP_NORM).sum())
        assert found == pytest.approx(best, rel=1e-4)
    assert bool((qparams.scale_EOG < 0).any()) == (kind == "iq4_nl")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_search_the_largest_weight_lies_on_the_outermost_level(kind: Kind) -> None:
    qparams, _ = quantized(WEIGHT_EOI, GridSpec.of_kind(kind, clip_search=False))
    groups_EOGS = WEIGHT_EOI.unflatten(2, (-1, TABLES[kind].group_size))
    extreme_EOG = groups_EOGS.gather(3, groups_EOGS.abs().argmax(3, keepdim=True)).squeeze(3)
    if kind == "iq4_nl":
        torch.testing.assert_close(-127 * qparams.scale_EOG.float(), extreme_EOG, rtol=2**-8, atol=0)
    elif kind == "nvfp4":
        torch.testing.assert_close(6 * qparams.scale_EOG.float(), extreme_EOG.abs(), rtol=2**-4, atol=0)
    else:
        ratio_EOG = extreme_EOG.abs() / 6 / qparams.scale_EOG.float()
        assert bool(((ratio_EOG > 0.7) & (ratio_EOG < 1.42)).all())


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5, 30.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_what_the_runtime_holds_and_zeros_stay_zero(kind: Kind, size: float) -> None:
    grid = GridSpec.of_kind(kind)
    weight_EOI = size * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    qparams, real_EOI = quantized(weight_EOI, grid)
    scale = qparams.scale_EOG.float()
    if kind == "iq4_nl":
        assert torch.equal(scale.half().float(), scale)
    elif kind == "nvfp4":
        ratio = scale * 2.0 ** -common_exponent([scale])
        assert torch.equal(ratio.to(torch.float8_e4m3fn).float(), ratio)
    else:
        assert bool(((torch.frexp(scale).mantissa == 0.5) | (scale == 0)).all())
    assert bool((scale == 0).all()) == (size == 0)
    assert size != 0 or not real_EOI.any()
    solution = gptq_solve(weight_EOI, torch.eye(32)[None], grid, SolveSpec(), BF16)
    assert bool(real_values(solution.codes_EOI, qparams, grid).isfinite().all())
    assert int(solution.codes_EOI.max()) < len(TABLES[kind].levels)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("rows", [10, 96])
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_column_by_column_obq_on_the_table(kind: Kind, rows: int, act_order: bool) -> None:
    weight_EOI, hessian_EII = problem(3, experts=2, shape=(rows, 64))
    grid, solve = GridSpec.of_kind(kind), SolveSpec(0.01, act_order, 40)
    solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, BF16)
    qparams = choose_qparams(weight_EOI, grid, BF16)
    kept = gptq_solve(weight_EOI, hessian_EII, grid, solve, BF16, qparams=qparams)
    assert torch.equal(kept.codes_EOI, solution.codes_EOI)
    real_EOI = real_values(kept.codes_EOI, qparams, grid)
    expected_EOI = torch.stack([
        reference_obq(weight_OI, hessian_II, scale_OG, kind, solve)
        for weight_OI, hessian_II, scale_OG in zip(weight_EOI, hessian_EII, qparams.scale_EOG.double(), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(
        output_error(weight_EOI, real_EOI, hessian_EII), output_error(weight_EOI, expected_EOI.float(), hessian_EII),
        rtol=1e-4, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        kept.relative_error_E, output_error(weight_EOI, real_EOI, hessian_EII), rtol=1e-3, atol=0
    )
    refitted_EOI = real_values(solution.codes_EOI, QParams(solution.scale_EOG, None), grid)
    torch.testing.assert_close(
        solution.relative_error_E, output_error(weight_EOI, refitted_EOI, hessian_EII), rtol=1e-3, atol=0
    )
    assert bool((solution.relative_error_E <= kept.relative_error_E * (1 + 1e-6)).all())
    assert kind != "iq4_nl" or bool((solution.relative_error_E < 0.99 * kept.relative_error_E).all())
    nearest = round_to_nearest(weight_EOI, grid, BF16, hessian_EII).relative_error_E
    assert bool((solution.relative_error_E < 0.9 * nearest).all())


def reference_obq(weight_OI: Tensor, hessian_II: Tensor, scale_OG: Tensor, kind: str, solve: SolveSpec) -> Tensor:
    """Optimal brain quantization with the inverse Hessian updated explicitly, float64."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    size, levels = len(hessian_II), torch.tensor(TABLES[kind].levels, dtype=torch.float64)
    inverse_II = torch.linalg.inv(hessian_II + solve.damping * hessian_II.diagonal().mean() * torch.eye(size).double())
    order = sorted(range(size), key=lambda i: -float(hessian_II[i, i])) if solve.act_order else range(size)
    result_OI = torch.empty_like(weight_OI)
    for column in order:
        values_OK = scale_OG[:, column // TABLES[kind].group_size, None] * levels
        nearest_O = (values_OK - weight_OI[:, column, None]).abs().argmin(1)
        result_OI[:, column] = values_OK.gather(1, nearest_O[:, None])[:, 0]
        error_O = (weight_OI[:, column] - result_OI[:, column]) / inverse_II[column, column]
        weight_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
        inverse_II[column, :] = inverse_II[:, column] = 0.0
        inverse_II[column, column] = 1.0
    return result_OI


def test_scales_in_float8_share_a_power_of_two_whatever_the_weight_and_lose_nothing() -> None:
    grid, generator = GridSpec.of_kind("nvfp4"), torch.Generator().manual_seed(2)
    # Groups from 2^-30 to 2^3 of each other, as outliers and pruned channels make them.
    weight_EOI = torch.randn(2, 8, 256, generator=generator) * 2.0 ** torch.randint(
        -30, 4, (2, 8, 1), generator=generator
    )
    solution = gptq_solve(weight_EOI, torch.eye(256)[None].expand(2, -1, -1), grid, SolveSpec(), BF16)
    for expert, scale_OG in enumerate(solution.scale_EOG.float()):
        power = common_exponent([scale_OG[:4], scale_OG[4:]])
        held_OG = (scale_OG * 2.0**-power).to(torch.float8_e4m3fn)
        assert torch.equal(held_OG.float() * 2.0**power, scale_OG)
        assert 224 <= float(held_OG.float().max()) <= 448
        smallest = float(scale_OG[scale_OG > 0].min())
        assert smallest >= float(weight_EOI[expert].abs().max()) / 6 * 2.0**-DEEPEST / 2


def test_a_common_power_of_two_is_the_least_that_fits_and_is_refused_where_there_is_none() -> None:
    for largest, power in ((448.0, 0), (480.0, 1), (240.0, 0), (224.0, -1), (0.0, 0), (3 * 2.0**-20, -27)):
        assert common_exponent([torch.tensor([largest, largest / 2])]) == power
    with pytest.raises(ValueError, match=r"from 0\.00104 to 448 have no power of two in common.*another grid"):
        common_exponent([torch.tensor([448.0]), torch.tensor([1.0625 * 2.0**-10])])


def test_the_dtype_of_a_model_that_is_narrow_bounds_scales_in_float8() -> None:
    weight_EOI = 1e-3 * torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3))
    weight_EOI[0, 0, 0] = 1.0
    scale_EOG = choose_qparams(weight_EOI, GridSpec.of_kind("nvfp4"), torch.float16).scale_EOG
    assert float(scale_EOG.min()) >= torch.finfo(torch.float16).tiny
    assert common_exponent([scale_EOG]) == -11


def test_scales_in_float8_depend_on_their_own_weight_whatever_is_searched_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = GridSpec.of_kind("nvfp4")
    weight_EOI = torch.cat([WEIGHT_EOI, 1e-4 * WEIGHT_EOI])
    weight_EOI[:, 0, :16] *= 1e-3  # as far below the largest as scales go
    alone = [choose_qparams(weight_OI[None], grid, BF16).scale_EOG for weight_OI in weight_EOI]
    monkeypatch.setattr("moeq.quant.grid.CPU_CHUNK", 80)
    assert torch.equal(choose_qparams(weight_EOI, grid, BF16).scale_EOG, torch.cat(alone))
