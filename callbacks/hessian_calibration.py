"""Hessians of the sites of each pass, weighted by affinity for routed and shared experts (AGQ)."""

from contextlib import ExitStack

from moeq.callback import HookedStep
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
        hessians, power = module.run.hessians, float(module.hparams["affinity_power"])
        hessians.open(module.current_pass.parts, module.device)
        hooks.enter_context(hessians.gathered(module.adapter, power, module.hparams["routing"], self.mask))
