"""Round-to-nearest (RTN) of every weight: the baseline, and the smallest example of a method."""

from moeq.callback import SolveStep
from moeq.fit.solve import Solver
from moeq.module import MoEQuantModule
from moeq.quant.rtn import round_to_nearest


class RTN(SolveStep):
    """Round-to-nearest; uses no calibration data."""

    solves_named = True

    def solver(self, module: MoEQuantModule) -> Solver:
        return lambda unit, weight_EOI: round_to_nearest(weight_EOI, unit.grid, module.adapter.storage_dtype)
