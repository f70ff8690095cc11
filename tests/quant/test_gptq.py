"""GPTQ against an explicit float64 column-by-column solve, its limits, groups, failures."""

import pytest
import torch

from moeq.quant import factor
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import choose_qparams
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, SolveSpec
from tests.quant.obq import GRID_NAMES, GRIDS, SOLVES, output_error, problem, reference_obq, rounded


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_agrees_with_column_by_column_obq_in_float64(grid: GridSpec, solve: SolveSpec) -> None:
    for seed in range(3):
        weight_EOI, hessian_EII = problem(seed)
        solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
        expected_OI = reference_obq(weight_EOI[0], hessian_EII[0], grid, solve)
        expected_E = output_error(weight_EOI, expected_OI.float().unsqueeze(0), hessian_EII)
        found_E = output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII)
        torch.testing.assert_close(found_E, expected_E, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_identity_hessian_reduces_to_round_to_nearest(grid: GridSpec, solve: SolveSpec) -> None:
    weight_EOI, _ = problem(0, experts=2)
    identity_EII = 3.0 * torch.eye(96).expand(2, 96, 96)
    solution = gptq_solve(weight_EOI, identity_EII, grid, solve, torch.bfloat16)
    expected = round_to_nearest(weight_EOI, grid, torch.bfloat16)
    assert torch.equal(solution.codes_EOI, expected.codes_EOI)
    assert torch.equal(solution.scale_EOG, expected.scale_EOG)
    torch.testing.assert_close(solution.relative_error_E, expected.relative_error_E, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_experts_together_equal_experts_one_by_one(grid: GridSpec, solve: SolveSpec) -> None:
    weight_EOI, hessian_EII = problem(1, experts=3)
    together = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone = gptq_solve(weight_EOI[one], hessian_EII[one], grid, solve, torch.bfloat16)
        assert torch.equal(together.codes_EOI[one], alone.codes_EOI)
        assert torch.equal(together.scale_EOG[one], alone.scale_EOG)
        assert torch.equal(together.relative_error_E[one], alone.relative_error_E)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_every_expert_of_a_stack_agrees_with_obq_on_its_own_hessian(grid: GridSpec, solve: SolveSpec) -> None:
    weight_EOI, hessian_EII = problem(2, experts=3)
    weight_EOI[1] *= 7.0  # scales of its own
    hessian_EII[2] = hessian_EII[2].flip(0, 1)  # and an order of its own
    solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    pairs = zip(weight_EOI, hessian_EII, strict=True)
    expected_EOI = torch.stack([reference_obq(*pair, grid, solve) for pair in pairs]).float()
    expected_E = output_error(weight_EOI, expected_EOI, hessian_EII)
    found_E = output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII)
    torch.testing.assert_close(found_E, expected_E, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=1e-4, atol=0.0)


def test_mean_error_is_below_round_to_nearest_in_the_norm_of_the_hessian() -> None:
    for grid in GRIDS:
        for solve in SOLVES:
            problems = [problem(seed) for seed in range(5)]
            ours = [gptq_solve(w, h, grid, solve, torch.bfloat16).relative_error_E for w, h in problems]
            nearest = [round_to_nearest(w, grid, torch.bfloat16, h).relative_error_E for w, h in problems]
            assert torch.stack(ours).mean() < 0.9 * torch.stack(nearest).mean()


def test_permuting_the_columns_changes_nothing_with_act_order() -> None:
    weight_EOI, hessian_EII = problem(3)
    permutation_I = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    permuted_EII = hessian_EII[:, permutation_I][:, :, permutation_I]
    grid, solve = GridSpec(3, None, False, True), SolveSpec(0.01, True)
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    found = gptq_solve(weight_EOI[:, :, permutation_I], permuted_EII, grid, solve, torch.bfloat16)
    assert torch.equal(found.codes_EOI, expected.codes_EOI[:, :, permutation_I])


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight_EOI, hessian_EII = problem(4)
    grid, solve = GRIDS[1], SOLVES[0]
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    found = gptq_solve(weight_EOI, hessian_EII * 2.0**20, grid, solve, torch.bfloat16)
    assert torch.equal(found.codes_EOI, expected.codes_EOI)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
def test_dead_columns_are_rounded_to_their_nearest_level_and_disturb_no_other(solve: SolveSpec) -> None:
    weight_EOI, hessian_EII = problem(7)
    hessian_EII[:, 20] = hessian_EII[:, :, 20] = 0.0
    grid = GRIDS[0]
    solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    nearest = round_to_nearest(weight_EOI, grid, torch.bfloat16, hessian_EII)
    assert torch.equal(solution.codes_EOI[:, :, 20], nearest.codes_EOI[:, :, 20])
    assert rounded(solution, grid.bits)[:, :, 20].any()
    expected_E = output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII)
    torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=1e-4, atol=0.0)
    assert not solution.num_retries_E.any()


def test_an_expert_that_saw_no_token_is_rounded_and_never_zeroed() -> None:
    weight_EOI, _ = problem(8)
    solution = gptq_solve(weight_EOI, torch.zeros(1, 96, 96), GRIDS[1], SOLVES[0], torch.bfloat16)
    assert torch.equal(solution.codes_EOI, round_to_nearest(weight_EOI, GRIDS[1], torch.bfloat16).codes_EOI)
    assert solution.relative_error_E.tolist() == [0.0]


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
def test_an_expert_of_zeros_stays_zero(solve: SolveSpec) -> None:
    weight_EOI, hessian_EII = problem(9)
    for grid in GRIDS:
        solution = gptq_solve(torch.zeros_like(weight_EOI), hessian_EII, grid, solve, torch.bfloat16)
        assert not rounded(solution, grid.bits).any()
        assert solution.relative_error_E.tolist() == [0.0]


def test_hessians_that_are_not_positive_definite_are_retried_and_counted_per_expert() -> None:
    weight_EOI, hessian_EII = problem(10, experts=3)
    mean = float(hessian_EII[1].diagonal().mean())
    smallest = float(torch.linalg.eigvalsh(hessian_EII[1].double())[0])
    hessian_EII[1] -= torch.eye(96) * (smallest + 0.05 * mean)  # 1% of damping is too little, 10% is enough
    solution = gptq_solve(weight_EOI, hessian_EII, GRIDS[0], SOLVES[0], torch.bfloat16)
    assert solution.num_retries_E.tolist() == [0, 2, 0]
    assert not solution.failed_E.any()
    alone = gptq_solve(weight_EOI[:1], hessian_EII[:1], GRIDS[0], SOLVES[0], torch.bfloat16)
    assert torch.equal(solution.codes_EOI[:1], alone.codes_EOI)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
def test_a_hopeless_hessian_ends_in_round_to_nearest_and_says_so(solve: SolveSpec) -> None:
    weight_EOI, hessian_EII = problem(11, experts=2)
    hessian_EII[1, 3, 5] = hessian_EII[1, 5, 3] = 1e6
    for grid in GRIDS:
        solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
        assert solution.failed_E.tolist() == [False, True]
        assert solution.num_retries_E.tolist() == [0, len(factor.ATTEMPTS)]
        nearest = round_to_nearest(weight_EOI, grid, torch.bfloat16)
        assert torch.equal(solution.codes_EOI[1], nearest.codes_EOI[1])


def test_a_rank_deficient_hessian_solves_at_once_thanks_to_damping() -> None:
    weight_EOI, _ = problem(12)
    inputs_TI = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    hessian_EII = (inputs_TI.mT @ inputs_TI).unsqueeze(0)
    solution = gptq_solve(weight_EOI, hessian_EII, GRIDS[0], SOLVES[0], torch.bfloat16)
    assert solution.num_retries_E.tolist() == [0]
    expected_E = output_error(weight_EOI, rounded(solution, 3), hessian_EII)
    torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=1e-3, atol=0.0)


def test_bfloat16_weights_are_solved_in_float32() -> None:
    weight_EOI, hessian_EII = problem(13)
    weight_EOI = weight_EOI.bfloat16()
    found = gptq_solve(weight_EOI, hessian_EII, GRIDS[1], SOLVES[0], torch.bfloat16)
    expected = gptq_solve(weight_EOI.float(), hessian_EII, GRIDS[1], SOLVES[0], torch.bfloat16)
    assert torch.equal(found.codes_EOI, expected.codes_EOI)


def test_shapes_and_groups_that_do_not_fit_are_refused() -> None:
    weight_EOI, hessian_EII = problem(14)
    with pytest.raises(ValueError, match=r"shape \(1, 95, 95\) must be \(1, 96, 96\)"):
        gptq_solve(weight_EOI, hessian_EII[:, 1:, 1:], GRIDS[0], SOLVES[0], torch.bfloat16)
    for solve in SOLVES:
        with pytest.raises(ValueError, match=r"group_size \(20\) must divide in_features \(96\)"):
            gptq_solve(weight_EOI, hessian_EII, GridSpec(4, 20), solve, torch.bfloat16)


def test_known_parameters_give_the_same_solution(generator: torch.Generator) -> None:
    weight_EOI = torch.randn(2, 6, 32, generator=generator)
    x_ETI = torch.randn(2, 90, 32, generator=generator)
    hessian_EII, grid, solve = x_ETI.mT @ x_ETI, GridSpec(bits=3, group_size=8), SolveSpec(act_order=True)
    known = choose_qparams(weight_EOI, grid, torch.float32)
    first = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.float32)
    again = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.float32, qparams=known)
    assert torch.equal(first.codes_EOI, again.codes_EOI)
    assert torch.equal(first.scale_EOG, again.scale_EOG)
    with pytest.raises(ValueError, match="qparams are given, but groups without act-order are chosen on the way"):
        gptq_solve(weight_EOI, hessian_EII, grid, SolveSpec(act_order=False), torch.float32, qparams=known)
