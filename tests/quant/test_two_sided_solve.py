"""A solution under two Hessians: what is replaced, what stays, what is said."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, real_values
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.quant.two_sided import damped, two_sided_loss
from moeq.quant.two_sided_solve import TwoSidedSpec, two_sided_solution

E, O, I = 3, 24, 32  # noqa: E741
GRIDS = (
    GridSpec(3, 16), GridSpec(2, None), GridSpec(3, 16, symmetric=True),
    GridSpec(2, 16, symmetric=True, kind="full_range"), GridSpec(1, 16, symmetric=True),
)  # fmt: skip


def solved(grid: GridSpec) -> tuple[Solution, Tensor, tuple[Tensor, ...]]:
    """GPTQ's solution, weights, and the Hessians: of GPTQ, of outputs and of inputs."""
    generator = torch.Generator().manual_seed(0)
    weight_EOI = torch.randn(E, O, I, generator=generator)
    squares = [torch.randn(E, size, 2 * size, generator=generator) for size in (I, O, I)]
    hessians = tuple(value @ value.mT for value in squares)
    return gptq_solve(weight_EOI, hessians[0], grid, SolveSpec(), torch.float32), weight_EOI, hessians


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_two_sided_loss_falls_and_the_scales_stay(grid: GridSpec) -> None:
    before, weight_EOI, (hessian_EII, *factors) = solved(grid)
    spec = TwoSidedSpec(0.1, 2)
    after = two_sided_solution(before, weight_EOI, hessian_EII, *factors, grid, spec)
    output_EOO, input_EII = (damped(factor, 0.1) for factor in factors)
    losses, qparams = [], QParams(before.scale_EOG, before.zero_point_EOG)
    for solution in (before, after):
        delta_EOI = real_values(solution.codes_EOI, qparams, grid) - weight_EOI
        losses.append(two_sided_loss(delta_EOI, output_EOO, input_EII))
        # The relative error is that of one Hessian, as of any solver.
        expected_E = [
            float((delta @ h * delta).sum() / (w @ h * w).sum())
            for delta, h, w in zip(delta_EOI, hessian_EII, weight_EOI, strict=True)
        ]
        assert solution.relative_error_E.tolist() == pytest.approx(expected_E, rel=1e-3)
    assert (losses[1] < losses[0]).all()
    assert torch.equal(after.scale_EOG, before.scale_EOG)
    assert after.codes_EOI.max() < 2**grid.bits
    assert after.one_sided_E is not None
    assert not after.one_sided_E.any()


def test_an_expert_with_a_factor_that_cannot_be_factorised_keeps_its_codes_and_the_others_theirs() -> None:
    before, weight_EOI, (hessian_EII, output_EOO, input_EII) = solved(GRIDS[0])
    whole = two_sided_solution(before, weight_EOI, hessian_EII, output_EOO, input_EII, GRIDS[0], TwoSidedSpec())
    output_EOO = output_EOO.clone()
    output_EOO[1, 0, 1] = output_EOO[1, 1, 0] = 1e4  # not of any x x^T
    after = two_sided_solution(before, weight_EOI, hessian_EII, output_EOO, input_EII, GRIDS[0], TwoSidedSpec())
    assert after.one_sided_E is not None
    assert after.one_sided_E.tolist() == [False, True, False]
    assert torch.equal(after.codes_EOI[1], before.codes_EOI[1])
    assert torch.equal(after.codes_EOI[[0, 2]], whole.codes_EOI[[0, 2]])
    assert after.relative_error_E[1] == pytest.approx(float(before.relative_error_E[1]), rel=1e-3)


def test_an_expert_has_the_codes_that_it_has_alone() -> None:
    before, weight_EOI, hessians = solved(GRIDS[0])
    together = two_sided_solution(before, weight_EOI, *hessians, GRIDS[0], TwoSidedSpec())
    for e in range(E):
        one = slice(e, e + 1)
        tensors = {name: value[one] for name, value in vars(before).items() if isinstance(value, Tensor)}
        parts = (value[one] for value in (weight_EOI, *hessians))
        alone = two_sided_solution(replace(before, **tensors), *parts, GRIDS[0], TwoSidedSpec())
        assert torch.equal(alone.codes_EOI[0], together.codes_EOI[e])


@pytest.mark.parametrize("damping", [0.0, -1.0, float("inf")])
def test_damping_must_be_positive_and_finite(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        TwoSidedSpec(damping)
