"""Quantize the sites of each pass with GPTQ on the Hessians of that pass."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.module import MoEQuantModule
from moeq.quant.coverage import CoveragePolicy, CoverageSpec
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution
from moeq.solve import Unit, calibrated_hessians, quantize_sites


class GPTQ(Callback):
    """GPTQ (AGQ where the Hessians are affinity-weighted); needs HessianCalibration before it in the list.

    Args:
        coverage: What an expert with few tokens gets: "shrink" pulls its Hessian toward the pooled one of its block,
            "rtn" rounds it to nearest, "fail" stops.
        min_tokens: Experts with fewer tokens are reported (and fall back under "rtn" and "fail").
        kappa: Strength of the shrinkage, in tokens.
    """

    def __init__(self, coverage: CoveragePolicy = "shrink", min_tokens: int = 128, kappa: float = 256.0) -> None:
        self.coverage = CoverageSpec(coverage, min_tokens, kappa)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)
        current, run = pl_module.current_pass, pl_module.run
        if current.kind != "calibrate":
            return
        hessians = calibrated_hessians(run, current.sites, self.coverage, type(self).__name__)

        def solver(unit: Unit, weight_EOI: Tensor) -> Solution:
            return self.solve(pl_module, unit, weight_EOI, hessians[unit.site.name][list(unit.experts)])

        quantize_sites(pl_module.adapter, run, current.sites, solver)

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        """Solve one stack of weights on its Hessians: what a variant of GPTQ overrides."""
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, module.model.dtype)
