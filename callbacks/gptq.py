"""GPTQ of the weights of each pass, on the Hessians of that pass; under two Hessians where a step gathered both."""

from torch import Tensor

from moeq.callback import SolveStep
from moeq.fit.hessians import hessians_of
from moeq.fit.solve import Solver, Unit, factors_of
from moeq.module import MoEQuantModule
from moeq.quant.coverage import CoveragePolicy, CoverageSpec, Kappa
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution
from moeq.quant.two_sided_solve import two_sided_solution


class GPTQ(SolveStep):
    """GPTQ (AGQ where the Hessians are affinity-weighted); needs HessianCalibration in the list.

    With KroneckerFactors in the list GPTQ chooses the scales, and its codes are replaced by those of two-sided rounding
    and descent, on uniform and full-range grids.

    Args:
        coverage: What an expert with few tokens gets: "shrink" pulls its Hessian toward the pooled one of its block,
            "rtn" rounds it to nearest (not with KroneckerFactors), "fail" stops.
        min_tokens: Experts with fewer tokens are reported (and fall back under "rtn" and "fail").
        kappa: Strength of the shrinkage, in effective samples, or "auto": proportional to the in features.
    """

    needs_hessians, solves_named, takes_factors = True, True, True

    def __init__(self, coverage: CoveragePolicy = "shrink", min_tokens: int = 128, kappa: Kappa = "auto") -> None:
        self.coverage = CoverageSpec(coverage, min_tokens, kappa)

    def check(self, module: MoEQuantModule) -> None:
        """Refuse factors where experts are to be rounded to nearest."""
        super().check(module)
        if module.run.needs.factors and self.coverage.policy == "rtn":
            raise ValueError(
                "coverage (rtn) leaves experts to rounding, and KroneckerFactors solves all; choose shrink"
            )

    def solver(self, module: MoEQuantModule) -> Solver:
        run, parts = module.run, module.current_pass.parts
        hessians, fallbacks = hessians_of(run.hessians, parts, self.coverage)
        if run.factors is not None:
            fallbacks += run.factors.fallbacks(parts, run.plan, self.coverage)
        run.fallbacks += fallbacks

        def solve(unit: Unit, weight_EOI: Tensor) -> Solution:
            hessian_EII = hessians(unit.site, unit.experts)
            solution = self.solve(module, unit, weight_EOI, hessian_EII)
            if run.factors is None or unit.grid.is_named:
                return solution
            both = factors_of(run.factors, unit, self.coverage, weight_EOI.device)
            return two_sided_solution(solution, weight_EOI, hessian_EII, *both, unit.grid, run.factors.solve)

        return solve

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        """Solve one stack of weights on its Hessians: what a variant of GPTQ overrides."""
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, module.adapter.storage_dtype)
