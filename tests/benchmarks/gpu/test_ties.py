"""Codes that differ by a tie are told from codes that are wrong."""

import torch

from benchmarks.gpu.ties import compare_codes
from moeq.quant.factor import factorise
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec

GRID = GridSpec(4, None, symmetric=True)


def solution(codes_OI: torch.Tensor) -> Solution:
    zeros = torch.zeros(1)
    return Solution(codes_OI[None], torch.ones(1, len(codes_OI), 1), None, zeros, zeros, zeros.bool())


def test_a_row_is_judged_by_the_target_of_its_first_difference() -> None:
    x_TI = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    factor = factorise(x_TI.mT @ x_TI, 0.01, act_order=False)
    # What the first column's rounding leaves goes to the second, whose target is to lie between 1 and 2.
    weight_OI = torch.tensor([[0.3, 0.0, 0.2, 0.1]]).repeat(4, 1)
    weight_OI[:, 1] = 1.5 - factor.feedback_II[1, 0] * 0.3
    one_OI = torch.tensor([[8, 9, 8, 8]], dtype=torch.uint8).repeat(4, 1)
    other_OI = one_OI.clone()
    other_OI[1, 1] = 10  # the other side of the tie
    other_OI[2, 1:] = torch.tensor([10, 3, 12], dtype=torch.uint8)  # and what the feedback makes of it
    other_OI[3, 2] = 9  # no tie
    row = compare_codes(weight_OI[None], [factor], solution(one_OI), solution(other_OI), GRID)
    assert row == {"rows_equal": 1, "rows_of_a_tie": 2, "rows_otherwise": 1}
