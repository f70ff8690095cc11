"""Rounding to nearest on ranges that ignore what fits badly (HQQ): no calibration data."""

from torch import Tensor
from typing_extensions import override

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

    def __init__(self, norm: float = 0.7) -> None:
        self.norm = norm

    @override
    def check(self, module: MoEQuantModule) -> None:
        """Refuse one bit, too, whose zero point is no whole number."""
        super().check(module)
        if (name := next((name for name, grid in module.run.plan.items() if grid.bits == 1), None)) is not None:
            raise ValueError(f"HQQ needs 2 bits at least, and {name} is to have 1; use RTN or GPTQ, or more bits")

    def solver(self, module: MoEQuantModule) -> Solver:
        def solve(unit: Unit, weight_EOI: Tensor) -> Solution:
            qparams = half_quadratic(weight_EOI, unit.grid, module.adapter.storage_dtype, self.norm)
            return round_to_nearest(weight_EOI, unit.grid, module.adapter.storage_dtype, qparams=qparams)

        return solve
