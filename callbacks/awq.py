"""Scale the input channels of each stage where that lowers the output error (AWQ), then quantize it."""

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.fit.channel_scaling import gather_inputs, refuse_chunks, scale_stage
from moeq.fit.solve import Unit, quantize_sites
from moeq.models.adapter import STAGES
from moeq.module import MoEQuantModule
from moeq.quant.awq import round_scaled, scale_problem
from moeq.quant.coverage import CoveragePolicy, CoverageSpec, Kappa
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution


class AWQ(Callback):
    """AWQ (AGQ-AWQ where the Hessians are affinity-weighted); needs HessianCalibration before it in the list.

    Args:
        rounding: "nearest" is AWQ, with clipping ranges by output error; "gptq" solves the scaled weights with GPTQ.
        coverage: What an expert with few tokens gets, as for GPTQ.
        min_tokens: Experts with fewer tokens are reported.
        kappa: Strength of the shrinkage, as for GPTQ.
    """

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before any work a bound on memory that cuts a stage into several passes."""
        assert isinstance(pl_module, MoEQuantModule)
        refuse_chunks(pl_module.schedule)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale and quantize the sites of this pass, stage by stage."""
        assert isinstance(pl_module, MoEQuantModule)
        current, run, adapter = pl_module.current_pass, pl_module.run, pl_module.adapter
        if current.kind != "calibrate":
            return
        inputs = gather_inputs(run, current.sites, self.coverage)
        dtype = pl_module.model.dtype
        # A later stage divides what an earlier one has quantized.
        for stage in STAGES:
            sites = [site for site in current.sites if site.stage == stage]
            scales = scale_stage(adapter, run, sites, inputs) if sites else {}

            def solver(unit: Unit, weight_EOI: Tensor, scales: dict[str, Tensor] = scales) -> Solution:
                experts = list(unit.experts)
                hessian_EII, scale_EI = inputs[unit.site.name].hessian_EII[experts], scales[unit.site.name][experts]
                if self.rounding == "nearest":
                    return round_scaled(weight_EOI, hessian_EII, scale_EI, unit.grid, dtype)
                problem = scale_problem(weight_EOI, hessian_EII, scale_EI)
                return gptq_solve(*problem, unit.grid, pl_module.solve_spec, dtype)

            if sites:
                quantize_sites(adapter, run, sites, solver)
