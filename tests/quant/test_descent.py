"""Coordinate descent of a two-sided loss against a search in float64 over the moves that it may make."""

import pytest
import torch
from torch import Tensor

from moeq.quant import descent
from moeq.quant.descent import descend
from moeq.quant.two_sided import two_sided_loss, two_sided_round
from tests.quant.test_two_sided import E, problem


def reference_sweep(
    code_OI: Tensor, weight_OI: Tensor, factors: tuple[Tensor, Tensor], grid: tuple[Tensor, ...]
) -> None:
    """In place, float64: in each column the set of wishes that lowers the whole loss most, of those that are tried."""
    scale_OI, zero_OI = grid

    def loss(code_OI: Tensor) -> float:
        delta_OI = (code_OI - zero_OI) * scale_OI - weight_OI
        return float(two_sided_loss(delta_OI[None], factors[0][None], factors[1][None]))

    def one(row: int, column: int, level: int) -> Tensor:
        changed_OI = code_OI.clone()
        changed_OI[row, column] = level
        return changed_OI

    for column in range(code_OI.shape[1]):
        wishes = []
        for row in range(code_OI.shape[0]):
            losses = [loss(one(row, column, level)) for level in range(8)]
            best = losses.index(min(losses))
            if best != int(code_OI[row, column]):
                wishes.append((losses[best], row, best))
        wishes.sort()
        tried = []
        for number in sorted({len(wishes), len(wishes) // 4, len(wishes) // 16, 1}) if wishes else ():
            changed_OI = code_OI.clone()
            for _, row, level in wishes[:number]:
                changed_OI[row, column] = level
            tried.append((loss(changed_OI), changed_OI))
        if wishes:
            code_OI.copy_(min(tried, key=lambda pair: pair[0])[1])


@pytest.mark.parametrize(("seed", "block"), [(0, 32), (1, 3)])
def test_sweeps_make_the_best_of_the_moves_that_they_try(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "BLOCK", block)
    weight_EOI, output_EOO, input_EII, levels = problem(seed, 12, 7)
    levels.scale_EOI[:, ::3] *= -1  # of full-range grids
    start_EOI = levels.nearest(weight_EOI)
    found_EOI = descend(start_EOI, weight_EOI, output_EOO, input_EII, levels, num_sweeps=2)
    for e in range(E):
        expected_OI = start_EOI[e].double()
        for _ in range(2):
            grid = levels.scale_EOI[e].double(), levels.zero_point_EOI[e].double()
            reference_sweep(expected_OI, weight_EOI[e].double(), (output_EOO[e].double(), input_EII[e].double()), grid)
        assert torch.equal(found_EOI[e].double(), expected_OI)
    assert not torch.equal(found_EOI, start_EOI)


def test_descent_lowers_the_loss_and_ends_where_no_single_move_helps() -> None:
    weight_EOI, output_EOO, input_EII, levels = problem(4, 24, 16)
    rounded_EOI = two_sided_round(weight_EOI, output_EOO, input_EII, levels)
    found_EOI = descend(rounded_EOI, weight_EOI, output_EOO, input_EII, levels, num_sweeps=50)
    assert torch.equal(descend(found_EOI, weight_EOI, output_EOO, input_EII, levels, num_sweeps=1), found_EOI)
    losses = [
        two_sided_loss(levels.real(code) - weight_EOI, output_EOO, input_EII)
        for code in (levels.nearest(weight_EOI), rounded_EOI, found_EOI)
    ]
    assert (losses[0] > losses[1]).all()
    assert (losses[1] > losses[2]).all()


def test_identities_move_nothing() -> None:
    weight_EOI, _, _, levels = problem(5)
    eyes = (torch.eye(size).expand(E, size, size) for size in weight_EOI.shape[1:])
    nearest_EOI = levels.nearest(weight_EOI)
    assert torch.equal(descend(nearest_EOI, weight_EOI, *eyes, levels, num_sweeps=3), nearest_EOI)
