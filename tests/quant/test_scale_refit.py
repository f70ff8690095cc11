"""Scales that are fitted to codes: the least of a quadratic error, as they are stored, and never a worse one."""

import pytest
import torch

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams, real_values
from moeq.quant.scale_refit import refit_scales
from moeq.quant.spec import GridSpec, SolveSpec
from tests.quant.obq import output_error, problem

GRIDS = [
    GridSpec(3, 16, symmetric=True, kind="full_range"), GridSpec(2, 32), GridSpec(4, None, symmetric=True),
    GridSpec.of_kind("iq4_nl"), GridSpec.of_kind("nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_scales_lower_the_error_and_are_stored_as_they_are_judged(grid: GridSpec, dtype: torch.dtype) -> None:
    weight_EOI, hessian_EII = problem(1, experts=2, shape=(12, 96))
    before = choose_qparams(weight_EOI, grid, dtype)
    codes_EOI = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), dtype, qparams=before).codes_EOI
    after, error_E = refit_scales(weight_EOI, hessian_EII, codes_EOI, before, grid)
    old_EOI, new_EOI = (real_values(codes_EOI, qparams, grid) for qparams in (before, after))
    old_E, new_E = (output_error(weight_EOI, real_EOI, hessian_EII) for real_EOI in (old_EOI, new_EOI))
    assert bool((new_E < 0.999 * old_E).all())
    energy_E = output_error(weight_EOI, torch.zeros_like(weight_EOI), hessian_EII)
    whole_E = ((weight_EOI @ hessian_EII) * weight_EOI).sum((1, 2)).double() * energy_E
    torch.testing.assert_close(error_E / whole_E, new_E, rtol=1e-3, atol=0)
    assert after.scale_EOG.dtype == dtype
    assert torch.equal(after.scale_EOG.sign(), before.scale_EOG.sign())
    assert (after.zero_point_EOG is None) == grid.symmetric


def test_gptq_fits_full_range_scales_to_its_codes_unless_they_are_given() -> None:
    weight_EOI, hessian_EII = problem(5, experts=3, shape=(12, 96))
    grid, dtype = GRIDS[0], torch.bfloat16
    given = choose_qparams(weight_EOI, grid, dtype)
    kept, fitted = (gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), dtype, qparams=q) for q in (given, None))
    assert torch.equal(kept.scale_EOG, given.scale_EOG)
    assert torch.equal(fitted.codes_EOI, kept.codes_EOI)
    expected = [refit_scales(weight_EOI[e:e + 1], hessian_EII[e:e + 1], kept.codes_EOI[e:e + 1],
                             given.experts(slice(e, e + 1)), grid)[0].scale_EOG for e in range(3)]  # fmt: skip
    assert torch.equal(fitted.scale_EOG, torch.cat(expected))
    assert bool((fitted.relative_error_E < kept.relative_error_E).all())


def test_one_group_per_row_gets_its_least_squares_scale() -> None:
    weight_EOI, hessian_EII = problem(2, shape=(5, 32))
    grid = GridSpec(3, None, symmetric=True)
    before = choose_qparams(weight_EOI, grid, torch.float32)
    codes_EOI = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), torch.float32, qparams=before).codes_EOI
    after, _ = refit_scales(weight_EOI, hessian_EII, codes_EOI, before, grid)
    for row in range(5):
        level_I, hessian_II = codes_EOI[0, row].double() - 4, hessian_EII[0].double()
        best = level_I @ hessian_II @ weight_EOI[0, row].double() / (level_I @ hessian_II @ level_I)
        assert float(after.scale_EOG[0, row, 0]) == pytest.approx(float(best), rel=1e-5)


def test_groups_of_zeros_keep_their_scale() -> None:
    weight_EOI, hessian_EII = problem(3, shape=(4, 64))
    weight_EOI[:, :, :32] = 0
    grid = GridSpec.of_kind("iq4_nl")
    before = choose_qparams(weight_EOI, grid, torch.bfloat16)
    solution = gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(), torch.bfloat16)
    assert not solution.scale_EOG[..., 0].any()
    assert not torch.equal(solution.scale_EOG[..., 1], before.scale_EOG[..., 1])
    assert not real_values(solution.codes_EOI, QParams(solution.scale_EOG, None), grid)[..., :32].any()
