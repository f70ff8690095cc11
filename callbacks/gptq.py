"""GPTQ of the weights of each pass, on the Hessians of that pass."""

from torch import Tensor

from moeq.callback import SolveStep
from moeq.fit.hessians import hessians_of
from moeq.fit.solve import Solver, Unit
from moeq.module import MoEQuantModule
from moeq.quant.coverage import CoveragePolicy, CoverageSpec, Kappa
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution


class GPTQ(SolveStep):
    """GPTQ (AGQ where the Hessians are affinity-weighted); needs HessianCalibration in the list.

    Args:
        coverage: What an expert with few tokens gets: "shrink" pulls its Hessian toward the pooled one of its block,
            "rtn" rounds it to nearest, "fail" stops.
        min_tokens: Experts with fewer tokens are reported (and fall back under "rtn" and "fail").
        kappa: Strength of the shrinkage, in effective samples, or "auto": proportional to the in features.
    """

    needs_hessians, solves_named = True, True

    def __init__(self, coverage: CoveragePolicy = "shrink", min_tokens: int = 128, kappa: Kappa = "auto") -> None:
        self.coverage = CoverageSpec(coverage, min_tokens, kappa)

    def solver(self, module: MoEQuantModule) -> Solver:
        hessians, fallbacks = hessians_of(module.run.hessians, module.current_pass.parts, self.coverage)
        module.run.fallbacks += fallbacks
        return lambda unit, weight_EOI: self.solve(module, unit, weight_EOI, hessians(unit.site, unit.experts))

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        """Solve one stack of weights on its Hessians: what a variant of GPTQ overrides."""
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, module.adapter.storage_dtype)
