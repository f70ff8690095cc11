"""GPTQ against an explicit float64 column-by-column solve, its limits, groups, failures."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.kernels import onednn
from moeq.quant import factor, gptq, sweep
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import choose_qparams, dequantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, SolveSpec

GRIDS = [GridSpec(3, None, True, False), GridSpec(4, 16, False, True), GridSpec(2, 24, False, False)]
SOLVES = [SolveSpec(0.01, True, 40), SolveSpec(0.01, False, 40)]


def problem(seed: int, experts: int = 1, shape: tuple[int, int] = (10, 96)) -> tuple[Tensor, Tensor]:
    """Weights and Hessians of correlated inputs, both float32."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    mixing_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs_ETI = torch.randn(experts, 2 * in_features, in_features, generator=generator) @ mixing_II
    weight_EOI = torch.randn(experts, out_features, in_features, generator=generator) * 0.05
    return weight_EOI, inputs_ETI.mT @ inputs_ETI / (2 * in_features)


def rounded(solution: Solution, bits: int) -> Tensor:
    return dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, bits)


def output_error(weight_EOI: Tensor, rounded_EOI: Tensor, hessian_EII: Tensor) -> Tensor:
    """tr(dW H dW^T) / tr(W H W^T) in float64."""
    weight, delta, hessian = weight_EOI.double(), (weight_EOI - rounded_EOI).double(), hessian_EII.double()
    return ((delta @ hessian) * delta).sum((1, 2)) / ((weight @ hessian) * weight).sum((1, 2))


def reference_obq(weight_OI: Tensor, hessian_II: Tensor, grid: GridSpec, solve: SolveSpec) -> Tensor:
    """Optimal brain quantization in a fixed order: one column at a time, the inverse Hessian updated explicitly."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    original_OI, size = weight_OI.clone(), len(hessian_II)
    inverse_II = torch.linalg.inv(hessian_II + solve.damping * hessian_II.diagonal().mean() * torch.eye(size).double())
    order = list(range(size))
    if solve.act_order:
        order.sort(key=lambda column: -float(hessian_II[column, column]))
    group_size = grid.group_size or size
    per_group = GridSpec(grid.bits, None, grid.symmetric, grid.clip_search)
    source_OI = original_OI if solve.act_order or grid.group_size is None else weight_OI
    parameters = {}
    result_OI = torch.empty_like(weight_OI)
    for column in order:
        group = column // group_size
        if group not in parameters:
            part_OS = source_OI[:, group * group_size : (group + 1) * group_size]
            qparams = choose_qparams(part_OS.float().unsqueeze(0), per_group, torch.bfloat16)
            zero = qparams.zero_point_EOG
            zero_O = torch.tensor(2.0 ** (grid.bits - 1)) if zero is None else zero[0, :, 0].double()
            parameters[group] = (qparams.scale_EOG[0, :, 0].double(), zero_O)
        scale_O, zero_O = parameters[group]
        code_O = (torch.round(weight_OI[:, column] / scale_O) + zero_O).clamp(0, 2**grid.bits - 1)
        result_OI[:, column] = (code_O - zero_O) * scale_O
        error_O = (weight_OI[:, column] - result_OI[:, column]) / inverse_II[column, column]
        weight_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
        inverse_II[column, :] = inverse_II[:, column] = 0.0
        inverse_II[column, column] = 1.0  # out of the way: no longer coupled to any column
    return result_OI


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
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
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
def test_identity_hessian_reduces_to_round_to_nearest(grid: GridSpec, solve: SolveSpec) -> None:
    weight_EOI, _ = problem(0, experts=2)
    identity_EII = 3.0 * torch.eye(96).expand(2, 96, 96)
    solution = gptq_solve(weight_EOI, identity_EII, grid, solve, torch.bfloat16)
    expected = round_to_nearest(weight_EOI, grid, torch.bfloat16)
    assert torch.equal(solution.codes_EOI, expected.codes_EOI)
    assert torch.equal(solution.scale_EOG, expected.scale_EOG)
    torch.testing.assert_close(solution.relative_error_E, expected.relative_error_E, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
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
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
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


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
def test_how_many_experts_advance_together_does_not_matter(
    grid: GridSpec, solve: SolveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_EOI, hessian_EII = problem(3, experts=5)
    hessian_EII[3, 3, 5] = hessian_EII[3, 5, 3] = 1e6  # rounded to nearest, after retries
    together = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    known = None if grid.group_size and not solve.act_order else choose_qparams(weight_EOI, grid, torch.bfloat16)
    sizes: list[int] = []

    def spy(weight_EOI: Tensor, *rest: object) -> Solution:
        sizes.append(len(weight_EOI))
        return _solve_together(weight_EOI, *rest)

    _solve_together = gptq._solve_together
    monkeypatch.setattr(gptq, "_solve_together", spy)
    monkeypatch.setattr(gptq, "TOGETHER_ROWS", 20)  # of 10 rows each
    in_pairs = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16, qparams=known)
    assert sizes == [2, 2, 1]
    for name, expected in vars(together).items():
        found = getattr(in_pairs, name)
        assert found is None if expected is None else torch.equal(found, expected), name


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


@pytest.mark.parametrize("column_block", [1, 7, 16, 96, 200])
def test_the_block_width_does_not_matter(column_block: int) -> None:
    weight_EOI, hessian_EII = problem(5)
    for grid in GRIDS:
        for act_order in (True, False):
            solves = [SolveSpec(0.01, act_order, width) for width in (column_block, 128)]
            found = [gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16) for solve in solves]
            errors = [output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII) for solution in found]
            torch.testing.assert_close(*errors, rtol=1e-5, atol=0.0)


WIDE_ROWS = 1100  # more than FEW_ROWS: a stack of an expert of every real model


@dataclass
class Spy:
    """How often a solve went which way."""

    alone: int = 0
    together: int = 0
    by_onednn: int = 0


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Counts the steps of both loops of a CPU and the products that reach oneDNN."""
    counts, linear = Spy(), torch.nn.functional.linear
    round_one, round_together = sweep._round_one, sweep._round_together

    def counted_one(*args: Any) -> None:
        counts.alone += 1
        round_one(*args)

    def counted_together(*args: Any) -> None:
        counts.together += 1
        round_together(*args)

    def counted_linear(left: Tensor, *rest: Any) -> Tensor:
        counts.by_onednn += left.is_mkldnn
        return linear(left, *rest)

    monkeypatch.setattr(sweep, "_round_one", counted_one)
    monkeypatch.setattr(sweep, "_round_together", counted_together)
    monkeypatch.setattr(torch.nn.functional, "linear", counted_linear)
    return counts


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=["channel", "group16", "group24"])
def test_weights_of_many_rows_go_one_expert_at_a_time_and_agree_with_obq(
    grid: GridSpec, solve: SolveSpec, spy: Spy
) -> None:
    weight_EOI, hessian_EII = problem(15, experts=2, shape=(WIDE_ROWS, 96))
    solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    assert spy.together == 0
    assert spy.alone > 0
    pairs = zip(weight_EOI, hessian_EII, strict=True)
    expected_EOI = torch.stack([reference_obq(*pair, grid, solve) for pair in pairs]).float()
    expected_E = output_error(weight_EOI, expected_EOI, hessian_EII)
    found_E = output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII)
    torch.testing.assert_close(found_E, expected_E, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(solution.relative_error_E, expected_E, rtol=1e-4, atol=0.0)
    # A row whose codes differ met a tie that float32 and float64 break differently; the rest of it may follow.
    tied_EO = (rounded(solution, grid.bits) - expected_EOI).abs().amax(2) > 1e-6
    assert tied_EO.double().mean() < 0.005


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("act_order", [True, False])
def test_large_products_through_onednn_give_the_codes_of_the_other_path(
    act_order: bool, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_EOI, hessian_EII = problem(16, shape=(WIDE_ROWS, 1024))
    grid, solve = GridSpec(3, 128, False, False), SolveSpec(0.01, act_order)
    found = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    assert spy.together == 0
    assert spy.by_onednn > 0
    through = dataclasses.replace(spy)
    monkeypatch.setattr(onednn, "ONEDNN_ROWS", 1 << 30)
    monkeypatch.setattr(gptq, "FEW_ROWS", WIDE_ROWS)
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    assert spy.together > 0
    assert (spy.alone, spy.by_onednn) == (through.alone, through.by_onednn)
    # Sums in another order break a tie the other way now and then: one code in a hundred thousand, and what follows.
    flipped_OI = (found.codes_EOI != expected.codes_EOI)[0]
    assert flipped_OI.any(1).double().mean() < 0.01
    torch.testing.assert_close(found.relative_error_E, expected.relative_error_E, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("size", [40, 128, 300])
def test_the_reversed_factor_reproduces_the_damped_hessian(size: int) -> None:
    _, hessian_EII = problem(6, shape=(1, size))
    feedback = factor.factorise(hessian_EII[0], 0.01, act_order=True)
    factor_II = feedback.feedback_II.tril().double() * feedback.gain_I.double().unsqueeze(1)
    visited_II = hessian_EII[0][feedback.order_I][:, feedback.order_I].double()
    expected_II = visited_II + feedback.shift_I.double().diag()
    torch.testing.assert_close(factor_II.mT @ factor_II, expected_II, rtol=1e-4, atol=1e-5)
    assert not feedback.failed


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
