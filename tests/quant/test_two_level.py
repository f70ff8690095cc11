"""Two-level grids: their values, how scales are chosen, and what solvers make of them, against slow references."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams, dequantize_weight, quantize, real_values
from moeq.quant.kinds import TWO_LEVEL, Kind
from moeq.quant.learned import close_latent, latent_weight, level_offset, open_latent
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, SolveSpec, choose_grid
from moeq.quant.two_level_refit import refit_integers
from moeq.quant.two_level_search import choose_two_level
from tests.quant.obq import output_error, problem
from tests.two_level import reference_values, weight_with_every_number

KINDS: list[Kind] = [*TWO_LEVEL]  # type: ignore[list-item]
BF16 = torch.bfloat16


def levels_of(qparams: QParams, grid: GridSpec, row: int, group: int) -> Tensor:
    """Every value that a weight of a group may take, float64."""
    supers, known = qparams.super_scales, grid.two_level
    assert supers is not None
    assert known is not None
    block = group * known.group_size // 256
    scale = float(supers.scale_OB[0, row, block]) * int(qparams.scale_EOG[0, row, group])
    levels = torch.arange(2**known.bits).double() - (2 ** (known.bits - 1) if known.symmetric else 0)
    offset = 0.0
    if supers.min_OB is not None and qparams.zero_point_EOG is not None:
        offset = float(supers.min_OB[0, row, block]) * int(qparams.zero_point_EOG[0, row, group])
    return levels * scale - offset


def error_of(weight_EOI: Tensor, qparams: QParams, grid: GridSpec, importance_I: Tensor | None = None) -> float:
    delta_EOI = weight_EOI - real_values(quantize(weight_EOI, qparams, grid), qparams, grid)
    return float((delta_EOI.square() * (1.0 if importance_I is None else importance_I)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_rounded_once_from_the_exact_ones(kind: Kind, dtype: torch.dtype) -> None:
    weight = weight_with_every_number(kind, dtype=dtype)
    assert torch.equal(dequantize_weight(weight, weight.dtype), reference_values(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_takes_the_nearest_of_all_levels_of_a_group(kind: Kind) -> None:
    weight_EOI, grid = torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(1)), GridSpec.of_kind(kind)
    solution = round_to_nearest(weight_EOI, grid, BF16)
    qparams = QParams(solution.scale_EOG, solution.zero_point_EOG, solution.super_scales)
    real_OI = real_values(solution.codes_EOI, qparams, grid)[0]
    for row, column in itertools.product(range(3), range(0, 512, 7)):
        levels = levels_of(qparams, grid, row, column // (grid.group_size or 1))
        nearest = (levels - weight_EOI[0, row, column].double()).abs().min()
        assert abs(float(real_OI[row, column]) - float(weight_EOI[0, row, column])) <= float(nearest) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_chosen_can_be_stored_and_each_stage_of_the_search_is_better(kind: Kind) -> None:
    grid = GridSpec.of_kind(kind)
    known = TWO_LEVEL[kind]
    weight_EOI = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(2)) * 0.03
    importance_EI = torch.rand(2, 512, generator=torch.Generator().manual_seed(3)).square() * 5
    weight_EOI[0, :, 100] *= 6  # outliers
    errors = []
    for rounds in (-1, 0, 3):
        given = grid if rounds >= 0 else replace(grid, clip_search=False)
        found = QParams(*choose_two_level(weight_EOI, given, BF16, importance_EI, max(rounds, 0)))
        assert found.super_scales is not None
        assert found.super_scales.scale_OB.dtype == torch.float16
        assert found.super_scales.scale_OB.isfinite().all()
        assert found.scale_EOG.min() >= known.lowest_scale
        assert found.scale_EOG.max() <= known.highest_scale
        if found.zero_point_EOG is not None:
            assert 0 <= found.zero_point_EOG.min() <= found.zero_point_EOG.max() <= known.highest_scale
        errors.append(sum(error_of(weight_EOI[e : e + 1], found.experts(slice(e, e + 1)), grid, importance_EI[e])
                          for e in range(2)))  # fmt: skip
    assert errors[2] < errors[1] < errors[0]


def test_the_search_counts_errors_by_importance() -> None:
    grid, weight_EOI = GridSpec.of_kind("q2_k"), torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(4))
    importance_I = torch.where(torch.arange(256) % 2 == 0, 10.0, 0.1)
    plain = choose_qparams(weight_EOI, grid, BF16)
    weighted = choose_qparams(weight_EOI, grid, BF16, importance_I[None])
    assert error_of(weight_EOI, weighted, grid, importance_I) < 0.9 * error_of(weight_EOI, plain, grid, importance_I)
    assert error_of(weight_EOI, weighted, grid) > error_of(weight_EOI, plain, grid)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.02, 1e-7])
def test_weights_that_are_all_alike_stay_finite_and_near(value: float, kind: Kind) -> None:
    grid, weight_EOI = GridSpec.of_kind(kind), torch.full((1, 2, 256), value)
    solution = gptq_solve(weight_EOI, torch.zeros(1, 256, 256), grid, SolveSpec(), BF16)
    real_OI = dequantize_weight(solution.expert(0, grid), torch.float32)
    assert real_OI.isfinite().all()
    # Values below the smallest halves are lost, as in every file of this type.
    assert (real_OI - value).abs().max() <= 0.05 * abs(value) + 2.0**-24


def reference_gptq(weight_OI: Tensor, hessian_II: Tensor, grid: GridSpec, solve: SolveSpec, qparams: QParams) -> Tensor:
    """Column by column in float64 with the inverse Hessian updated explicitly, on committed levels."""
    left_OI, size = weight_OI.double().clone(), len(hessian_II)
    shift = solve.damping * hessian_II.double().diagonal().mean() * torch.eye(size).double()
    inverse_II = torch.linalg.inv(hessian_II.double() + shift)
    order = sorted(range(size), key=lambda j: -float(hessian_II[j, j])) if solve.act_order else range(size)
    for column in order:
        rounded_O = []
        for row in range(len(left_OI)):
            levels = levels_of(qparams, grid, row, column // (grid.group_size or 1))
            rounded_O.append(levels[(levels - left_OI[row, column]).abs().argmin()])
        error_O = (left_OI[:, column] - torch.stack(rounded_O)) / inverse_II[column, column]
        left_OI -= torch.outer(error_O, inverse_II[column])
        left_OI[:, column] = torch.stack(rounded_O)
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
        inverse_II[column, :] = inverse_II[:, column] = 0.0
        inverse_II[column, column] = 1.0
    return left_OI


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k"])
def test_gptq_on_a_committed_grid_agrees_with_a_column_by_column_solve(kind: Kind, act_order: bool) -> None:
    grid, solve = GridSpec.of_kind(kind), SolveSpec(0.01, act_order)
    weight_EOI, hessian_EII = problem(5, shape=(4, 256))
    qparams = choose_qparams(weight_EOI, grid, BF16)
    solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, BF16, qparams=qparams)
    expected_EOI = reference_gptq(weight_EOI[0], hessian_EII[0], grid, solve, qparams)[None]
    real_EOI = real_values(solution.codes_EOI, qparams, grid)
    expected_E = output_error(weight_EOI, expected_EOI, hessian_EII)
    torch.testing.assert_close(output_error(weight_EOI, real_EOI, hessian_EII), expected_E, rtol=2e-3, atol=0.0)
    torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=2e-3, atol=0.0)
    assert torch.equal(solution.scale_EOG, qparams.scale_EOG)  # what is given is kept


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_far_below_rounding_and_reports_the_error_that_it_has(kind: Kind) -> None:
    grid = GridSpec.of_kind(kind)
    weight_EOI, hessian_EII = problem(6, experts=2, shape=(16, 256))
    solution = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), BF16)
    real_EOI = torch.stack([dequantize_weight(solution.expert(e, grid), torch.float32) for e in range(2)])
    found_E = output_error(weight_EOI, real_EOI, hessian_EII)
    torch.testing.assert_close(solution.relative_error_E, found_E, rtol=1e-3, atol=0.0)
    rounded = round_to_nearest(weight_EOI, grid, BF16, hessian_EII)
    assert (found_E < 0.8 * rounded.relative_error_E).all()
    for expert in range(2):  # alone as in company
        one = slice(expert, expert + 1)
        alone = gptq_solve(weight_EOI[one], hessian_EII[one], grid, SolveSpec(), BF16)
        ours, theirs = solution.expert(expert, grid).tensors(), alone.expert(0, grid).tensors()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_refitted_integers_lower_the_error_and_no_single_step_lowers_it_further_in_the_last_group(kind: Kind) -> None:
    grid, known = GridSpec.of_kind(kind), TWO_LEVEL[kind]
    weight_EOI, hessian_EII = problem(7, shape=(6, 256))
    qparams = choose_qparams(weight_EOI, grid, BF16)
    codes_EOI = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), BF16, qparams=qparams).codes_EOI

    def errors(of: QParams) -> Tensor:
        delta_OI = (weight_EOI - real_values(codes_EOI, of, grid))[0].double()
        return ((delta_OI @ hessian_EII[0].double()) * delta_OI).sum(1)

    refitted, error_E = refit_integers(weight_EOI, hessian_EII, codes_EOI, qparams, grid)
    assert (errors(refitted) <= errors(qparams) * (1 + 1e-6)).all()
    assert float(errors(refitted).sum()) < float(errors(qparams).sum())
    torch.testing.assert_close(error_E[0], errors(refitted).sum(), rtol=1e-3, atol=0.0)
    for move in (-1, 1):
        scale_EOG = refitted.scale_EOG.clone()
        scale_EOG[..., -1] = (scale_EOG[..., -1].short() + move).clamp(known.lowest_scale, known.highest_scale)
        assert (errors(replace(refitted, scale_EOG=scale_EOG)) >= errors(refitted) * (1 - 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learned_rounding_starts_from_the_solution_and_ends_in_what_it_evaluated(kind: Kind) -> None:
    grid = GridSpec.of_kind(kind)
    weight_EOI, hessian_EII = problem(8, experts=2, shape=(4, 256))
    solution = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), BF16)
    given = [solution.expert(expert, grid) for expert in range(2)]
    offset_EOI = torch.stack([level_offset(*pair) for pair in zip(given, weight_EOI, strict=True)])
    latent = open_latent(given, offset_EOI)
    start_EOI = latent_weight(latent)
    assert torch.equal(start_EOI[1], dequantize_weight(given[1], torch.float32))
    start_EOI.square().sum().backward()
    assert latent.log_EOG.grad is not None
    assert latent.log_EOG.shape == (2, 4, 1)  # a d for each super-block
    latent.level_EOGS.data -= 0.6 * latent.level_EOGS.grad.sign()  # type: ignore[union-attr]
    latent.log_EOG.data += 0.01
    for expert, closed in enumerate(close_latent(latent, given)):
        assert torch.equal(latent_weight(latent)[expert], dequantize_weight(closed, torch.float32))
        assert torch.equal(closed.scale_OG, given[expert].scale_OG)
        assert not torch.equal(closed.codes_OI, given[expert].codes_OI)


def test_a_two_level_grid_has_the_bits_of_its_blocks() -> None:
    bits = {kind: grid.bits + grid.overhead_bits(512) / 512 for kind in KINDS for grid in [GridSpec.of_kind(kind)]}
    assert bits == {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q3_k has 3 bits in groups of 16, not 4 in groups of 64"):
        GridSpec(kind="q3_k")
    with pytest.raises(ValueError, match=r"one of q2_k, .*give bits for a uniform grid"):
        GridSpec.of_kind("uniform")
    with pytest.raises(ValueError, match="must be one of uniform, full_range, q2_k"):
        GridSpec(kind="q7_k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 256, not 384"):
        choose_qparams(torch.zeros(1, 2, 384), GridSpec.of_kind("q4_k"), BF16)
    assert choose_grid("q4_k", 4, 64, symmetric=False, clip_search=True) == GridSpec.of_kind("q4_k")
    with pytest.raises(ValueError, match=r"bits \(2\) follows from grid \(q4_k\)"):
        choose_grid("q4_k", 2, 64, symmetric=False, clip_search=True)
