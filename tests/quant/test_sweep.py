"""The two loops of a CPU and the products between them: which way a solve goes, and that the ways agree."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.kernels import onednn
from moeq.quant import gptq, sweep, workspace
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import choose_qparams
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, SolveSpec
from tests.quant.obq import GRID_NAMES, GRIDS, SOLVES, output_error, problem, reference_obq, rounded

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

    def counted_one(*args: Any, **more: Any) -> None:
        counts.alone += 1
        round_one(*args, **more)

    def counted_together(*args: Any, **more: Any) -> None:
        counts.together += 1
        round_together(*args, **more)

    def counted_linear(left: Tensor, *rest: Any) -> Tensor:
        counts.by_onednn += left.is_mkldnn
        return linear(left, *rest)

    monkeypatch.setattr(sweep, "_round_one", counted_one)
    monkeypatch.setattr(sweep, "_round_together", counted_together)
    monkeypatch.setattr(torch.nn.functional, "linear", counted_linear)
    return counts


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
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
    for module in (gptq, workspace):
        monkeypatch.setattr(module, "FEW_ROWS", WIDE_ROWS)
    expected = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    assert spy.together > 0
    assert (spy.alone, spy.by_onednn) == (through.alone, through.by_onednn)
    # Sums in another order break a tie the other way now and then: one code in a hundred thousand, and what follows.
    flipped_OI = (found.codes_EOI != expected.codes_EOI)[0]
    assert flipped_OI.any(1).double().mean() < 0.01
    torch.testing.assert_close(found.relative_error_E, expected.relative_error_E, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("solve", SOLVES, ids=["act_order", "in_order"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_how_many_experts_advance_together_does_not_matter(
    grid: GridSpec, solve: SolveSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_EOI, hessian_EII = problem(3, experts=5)
    hessian_EII[3, 3, 5] = hessian_EII[3, 5, 3] = 1e6  # rounded to nearest, after retries
    together = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16)
    known = None if grid.group_size and not solve.act_order else choose_qparams(weight_EOI, grid, torch.bfloat16)
    sizes: list[int] = []

    def counted(weight_EOI: Tensor, *rest: Any) -> Solution:
        sizes.append(len(weight_EOI))
        return _solve_together(weight_EOI, *rest)

    _solve_together = gptq._solve_together
    monkeypatch.setattr(gptq, "_solve_together", counted)
    monkeypatch.setattr(workspace, "TOGETHER_ROWS", 20)  # of 10 rows each
    in_pairs = gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16, qparams=known)
    assert sizes == [2, 2, 1]
    for name, expected in vars(together).items():
        found = getattr(in_pairs, name)
        assert found is None if expected is None else torch.equal(found, expected), name


@pytest.mark.parametrize("column_block", [1, 7, 16, 96, 200])
def test_the_block_width_does_not_matter(column_block: int) -> None:
    weight_EOI, hessian_EII = problem(5)
    for grid in GRIDS:
        for act_order in (True, False):
            solves = [SolveSpec(0.01, act_order, width) for width in (column_block, 128)]
            found = [gptq_solve(weight_EOI, hessian_EII, grid, solve, torch.bfloat16) for solve in solves]
            errors = [output_error(weight_EOI, rounded(solution, grid.bits), hessian_EII) for solution in found]
            torch.testing.assert_close(*errors, rtol=1e-5, atol=0.0)
