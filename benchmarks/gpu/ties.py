"""Whether two sets of codes of one weight differ by ties alone.

A last bit of a target turns a code where it lies between two levels, and the feedback carries that on through the rest
of the row: rows that differ are judged by their first difference.  Its target is computed in float64 from the codes
before it, which both have.

Shapes: E experts, O out features, I in features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.lab.tables import Row
from moeq.quant.factor import Feedback
from moeq.quant.grid import dequantize
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec

TIE = 2e-3  # of a level


def compare_codes(
    weight_EOI: Tensor, factors: Sequence[Feedback], one: Solution, other: Solution, grid: GridSpec
) -> Row:
    """Rows that are equal, that a tie turned, and that differ otherwise.

    Args:
        weight_EOI: What was quantized.
        factors: Of the Hessians, by which both sets were found.
        one: Codes.
        other: Codes on the same scales and zero points.
        grid: Of both.
    """
    real = [dequantize(each.codes_EOI, each.scale_EOG, each.zero_point_EOG, grid.bits) for each in (one, other)]
    ties = otherwise = 0
    for expert, factor in enumerate(factors):
        order_I = factor.order_I
        weight_OI, one_OI, other_OI = (w[expert].double()[:, order_I] for w in (weight_EOI, *real))
        different_OI = one_OI != other_OI
        rows = different_OI.any(1).nonzero()[:, 0]
        first_R = different_OI[rows].int().argmax(1)
        feedback_RI = factor.feedback_II.double()[first_R]
        before_RI = torch.arange(len(order_I)) < first_R.unsqueeze(1)
        delta_RI = (weight_OI - one_OI)[rows] * before_RI
        pick = torch.arange(len(rows)), first_R
        target_R = weight_OI[rows][pick] + (feedback_RI * delta_RI).sum(1)
        a_R, b_R = one_OI[rows][pick], other_OI[rows][pick]
        is_tie_R = (target_R - (a_R + b_R) / 2).abs() <= TIE * (a_R - b_R).abs()
        ties += int(is_tie_R.sum())
        otherwise += int((~is_tie_R).sum())
    total = weight_EOI.shape[0] * weight_EOI.shape[1]
    return {"rows_equal": total - ties - otherwise, "rows_of_a_tie": ties, "rows_otherwise": otherwise}
