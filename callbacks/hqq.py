"""Rounding to nearest on ranges that ignore what fits badly (HQQ): no calibration data."""

from torch import Tensor

from moeq.callback import SolveStep
from moeq.fit.solve import Solver, Unit
from moeq.module import MoEQuantModule
from moeq.quant.hqq import half_quadratic
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution


class HQQ(SolveStep):
    """Half-quadratic quantization; uses no calibration data.

    Args:
        norm: Exponent of the error that is minimised, above 0 and at most 1.
    """

    fewest_bits = 2  # the zero point of one bit is no whole number

    def __init__(self, norm: float = 0.7) -> None:
        self.norm = norm

    def solver(self, module: MoEQuantModule) -> Solver:
        def solve(unit: Unit, weight_EOI: Tensor) -> Solution:
            qparams = half_quadratic(weight_EOI, unit.grid, module.adapter.storage_dtype, self.norm)
            return round_to_nearest(weight_EOI, unit.grid, module.adapter.storage_dtype, qparams=qparams)

        return solve
