"""Scaling of the input channels of each stage where that lowers the output error (AWQ), then quantization."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from moeq.callback import SolveStep
from moeq.fit.channel_scaling import Inputs, gather_inputs, refuse_chunks, scale_stage
from moeq.fit.solve import Solver, Unit, quantize_sites
from moeq.models.adapter import STAGES
from moeq.module import MoEQuantModule
from moeq.quant.awq import round_scaled, scale_problem
from moeq.quant.coverage import CoveragePolicy, CoverageSpec, Kappa
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution


class AWQ(SolveStep):
    """AWQ (AGQ-AWQ where the Hessians are affinity-weighted); needs HessianCalibration in the list.

    Args:
        rounding: "nearest" is AWQ, with clipping ranges by output error; "gptq" solves the scaled weights with GPTQ.
        coverage: What an expert with few tokens gets, as for GPTQ.
        min_tokens: Experts with fewer tokens are reported.
        kappa: Strength of the shrinkage, as for GPTQ.
    """

    needs_hessians = True

    def __init__(
        self,
        rounding: Literal["nearest", "gptq"] = "nearest",
        coverage: CoveragePolicy = "shrink",
        min_tokens: int = 128,
        kappa: Kappa = "auto",
    ) -> None:
        if rounding not in ("nearest", "gptq"):
            raise ValueError(f"rounding ({rounding}) must be nearest or gptq; nearest is AWQ")
        self.rounding = rounding
        self.coverage = CoverageSpec(coverage, min_tokens, kappa)

    def check(self, module: MoEQuantModule) -> None:
        """Refuse before any work a bound on memory that cuts a stage into several passes."""
        super().check(module)
        refuse_chunks(module.walk.schedule)

    def solve_pass(self, module: MoEQuantModule) -> None:
        """Scale and quantize the sites of this pass, stage by stage: a later one divides what an earlier quantized."""
        current, run, adapter = module.current_pass, module.run, module.adapter
        inputs, call = gather_inputs(run, current.parts, self.coverage), module.walk.probe.call(current.block)
        for stage in STAGES:
            if sites := [site for site in current.sites if site.stage == stage]:
                scales = scale_stage(adapter, run, sites, inputs, call)
                quantize_sites(adapter, run, sites, self._scaled_solver(module, inputs, scales))

    def _scaled_solver(
        self, module: MoEQuantModule, inputs: Mapping[str, Inputs], scales: Mapping[str, Tensor]
    ) -> Solver:
        dtype = module.adapter.storage_dtype

        def solve(unit: Unit, weight_EOI: Tensor) -> Solution:
            experts = list(unit.experts)
            hessian_EII, scale_EI = inputs[unit.site.name].hessian_EII[experts], scales[unit.site.name][experts]
            if self.rounding == "nearest":
                return round_scaled(weight_EOI, hessian_EII, scale_EI, unit.grid, dtype)
            problem = scale_problem(weight_EOI, hessian_EII, scale_EI)
            return gptq_solve(*problem, unit.grid, module.solve_spec, dtype)

        return solve
