"""Hessians of the sites of each pass, weighted by affinity for routed and shared experts (AGQ)."""

from contextlib import ExitStack

from torch import Tensor

from moeq.callback import HookedStep
from moeq.models.adapter import Site
from moeq.models.observe import observe
from moeq.module import MoEQuantModule


class HessianCalibration(HookedStep):
    """Sums of affinity ** power * x x^T and token counts per expert for ``run.hessians``, by site.

    Their sums over all experts of a site are gathered in the first pass that has a part of the site, in an order that
    does not depend on how the site was cut.

    With ``--model.routing all_experts`` they are those of all tokens instead, each with weight 1.
    The power is ``--model.affinity_power``: 1 is Affinity-Guided Quantization (MoEQuant, Eq. 19), 0 plain GPTQ.
    """

    gathers_hessians = True

    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        """Attach to the sites of this pass."""
        hessians, parts = module.run.hessians, module.current_pass.parts
        power = float(module.hparams["affinity_power"])
        hessians.open(parts, module.device)

        def on_rows(site: Site, expert: int, x_TI: Tensor, affinity_T: Tensor | None) -> None:
            hessians.add(site, expert, x_TI, affinity_T, power)

        sites = tuple(part.site for part in parts)
        hooks.enter_context(observe(module.adapter, sites, on_rows, module.hparams["routing"], self.mask))
