"""Quantize the sites of each pass with GPTQ on the Hessians of that pass."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.fit.solve import Unit, quantize_sites
from moeq.module import MoEQuantModule
from moeq.quant.coverage import CoveragePolicy, CoverageSpec, Kappa, find_uncovered, hessians_to_solve
from moeq.quant.gptq import gptq_solve
from moeq.quant.solution import Solution


class GPTQ(Callback):
    """GPTQ (AGQ where the Hessians are affinity-weighted); needs HessianCalibration before it in the list.

    Args:
        coverage: What an expert with few tokens gets: "shrink" pulls its Hessian toward the pooled one of its block,
            "rtn" rounds it to nearest, "fail" stops.
        min_tokens: Experts with fewer tokens are reported (and fall back under "rtn" and "fail").
        kappa: Strength of the shrinkage, in effective samples, or "auto": proportional to the in features.
    """

    def __init__(self, coverage: CoveragePolicy = "shrink", min_tokens: int = 128, kappa: Kappa = "auto") -> None:
        self.coverage = CoverageSpec(coverage, min_tokens, kappa)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)
        current, run = pl_module.current_pass, pl_module.run
        if current.kind != "calibrate":
            return
        uncovered: dict[str, Tensor] = {}
        for part in current.parts:
            site = part.site
            if site.name not in run.hessians:
                raise ValueError("GPTQ found no Hessian; put HessianCalibration before GPTQ")
            # Stacked linears share a Hessian: the first stands for all of them in the report.
            names = [site.weight_name(expert, site.leaves[0]) for expert in part.experts]
            state, pool = run.hessians[site.name], run.pools.get(site.name)
            uncovered[site.name], fallbacks = find_uncovered(state, self.coverage, names, pool)
            run.fallbacks += fallbacks
        first = {part.site.name: part.experts.start for part in current.parts}

        def solver(unit: Unit, weight_EOI: Tensor) -> Solution:
            name = unit.site.name
            experts = [expert - first[name] for expert in unit.experts]
            hessian_EII = hessians_to_solve(run.hessians[name], self.coverage, experts, run.pools.get(name))
            # GPTQ with an identity Hessian is round-to-nearest.
            hessian_EII[uncovered[name][experts]] = torch.eye(unit.site.in_features, device=hessian_EII.device)
            return self.solve(pl_module, unit, weight_EOI, hessian_EII)

        quantize_sites(pl_module.adapter, run, current.sites, solver, current.parts)

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        """Solve one stack of weights on its Hessians: what a variant of GPTQ overrides."""
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, module.model.dtype)
