"""Grids by a table: nearest levels, searched scales, and what solvers make of them, against slow references."""

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
from moeq.quant.tables import SMALLEST, STEPS
from tests.quant.obq import output_error, problem

KINDS: list[Kind] = [*TABLES]  # type: ignore[list-item]
BF16 = torch.bfloat16
WEIGHT_EOI = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)) ** 3 * 0.02


def reference_round(weight: float, scale: float, kind: str) -> float:
    """The nearest of all values of a group."""
    return min((scale * level for level in TABLES[kind].levels), key=lambda value: abs(value - weight))


def reference_error(group: list[float], scale: float, kind: str) -> float:
    return sum(abs(reference_round(w, scale, kind) - w) ** CLIP_NORM for w in group)


def stored(scale: float, kind: str) -> float:
    """A scale as the runtime holds it, in bfloat16, too."""
    if kind == "mxfp4":
        return 2.0 ** round(float(torch.tensor(scale).log2()))
    return float(torch.tensor(scale).bfloat16().half())


def quantized(weight_EOI: Tensor, grid: GridSpec) -> tuple[QParams, Tensor]:
    qparams = choose_qparams(weight_EOI, grid, BF16)
    return qparams, real_values(quantize(weight_EOI, qparams, grid), qparams, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_the_nearest_value_of_its_group(kind: Kind) -> None:
    qparams, real_EOI = quantized(WEIGHT_EOI, GridSpec.of_kind(kind))
    for e, o, i in product(range(2), range(6), range(0, 64, 3)):
        expected = reference_round(float(WEIGHT_EOI[e, o, i]), float(qparams.scale_EOG[e, o, i // 32]), kind)
        assert float(real_EOI[e, o, i]) == pytest.approx(expected, rel=1e-6)
    weight = round_to_nearest(WEIGHT_EOI, GridSpec.of_kind(kind), BF16).expert(1, GridSpec.of_kind(kind))
    assert weight.kind == kind
    assert torch.equal(dequantize_weight(weight, torch.float32), real_EOI[1])
    assert torch.equal(dequantize_weight(weight.rows(slice(2, 4)), torch.float32), real_EOI[1, 2:4])


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_best_of_a_loop_over_sizes_and_signs(kind: Kind) -> None:
    qparams, real_EOI = quantized(WEIGHT_EOI, GridSpec.of_kind(kind))
    outermost = max(map(abs, TABLES[kind].levels))
    for e, o, g in product(range(2), range(6), range(2)):
        part = slice(32 * g, 32 * g + 32)
        group = WEIGHT_EOI[e, o, part].tolist()
        sizes = [max(map(abs, group)) / outermost * (1 - k * (1 - SMALLEST) / STEPS) for k in range(STEPS)]
        signs = (1,) if kind == "mxfp4" else (1, -1)
        best = min(reference_error(group, sign * stored(size, kind), kind) for size in sizes for sign in signs)
        found = float(((real_EOI[e, o, part] - WEIGHT_EOI[e, o, part]).abs().double() ** CLIP_NORM).sum())
        assert found == pytest.approx(best, rel=1e-4)
    assert bool((qparams.scale_EOG < 0).any()) == (kind == "iq4_nl")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_search_the_largest_weight_lies_on_the_outermost_level(kind: Kind) -> None:
    qparams, _ = quantized(WEIGHT_EOI, GridSpec.of_kind(kind, clip_search=False))
    groups_EOGS = WEIGHT_EOI.unflatten(2, (2, 32))
    extreme_EOG = groups_EOGS.gather(3, groups_EOGS.abs().argmax(3, keepdim=True)).squeeze(3)
    if kind == "iq4_nl":
        torch.testing.assert_close(-127 * qparams.scale_EOG.float(), extreme_EOG, rtol=2**-8, atol=0)
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
    assert kind == "mxfp4" or bool((solution.relative_error_E < 0.99 * kept.relative_error_E).all())
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
        values_OK = scale_OG[:, column // 32, None] * levels
        nearest_O = (values_OK - weight_OI[:, column, None]).abs().argmin(1)
        result_OI[:, column] = values_OK.gather(1, nearest_O[:, None])[:, 0]
        error_O = (weight_OI[:, column] - result_OI[:, column]) / inverse_II[column, column]
        weight_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
        inverse_II[column, :] = inverse_II[:, column] = 0.0
        inverse_II[column, column] = 1.0
    return result_OI
