"""Gather the Hessians of the sites of each pass, weighted by affinity for routed and shared experts (AGQ)."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Site
from moeq.models.observe import TokenMask, observe
from moeq.module import MoEQuantModule
from moeq.quant.coverage import shared_by
from moeq.quant.hessian import accumulate, empty_state


class HessianCalibration(Callback):
    """Puts sum of affinity ** power * x x^T and token counts per expert into ``run.hessians``, by site.

    Their sums over all experts of a site go into ``run.pools`` in the first pass that has a part of the site, in an
    order that does not depend on how the site was cut.

    With ``--model.routing all_experts`` they are those of all tokens instead, each with weight 1.
    The power is ``--model.affinity_power``: 1 is Affinity-Guided Quantization (MoEQuant, Eq. 19), 0 plain GPTQ.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._mask = TokenMask()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)
        run, parts = pl_module.run, {part.site.name: part for part in pl_module.current_pass.parts}
        power = float(pl_module.hparams["affinity_power"])
        for name, part in parts.items():
            run.hessians[name] = empty_state(part.num_sums, part.site.in_features, pl_module.device)
            if part.opens_pool:
                run.pools[name] = empty_state(1, part.site.in_features, pl_module.device)

        def on_rows(site: Site, expert: int, x_TI: Tensor, affinity_T: Tensor | None) -> None:
            part, state = parts[site.name], run.hessians[site.name]
            pool = run.pools[site.name] if part.opens_pool else None
            if part.shared:
                accumulate(state, 0, x_TI, affinity_T, power)
            elif expert in part.experts:
                accumulate(state, expert - part.experts.start, x_TI, affinity_T, power, pool)
            elif pool is not None:
                accumulate(pool, 0, x_TI, affinity_T, power)

        sites = tuple(part.site for part in parts.values())
        self._mask = self._stack.enter_context(observe(pl_module.adapter, sites, on_rows, pl_module.hparams["routing"]))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding tokens enter no Hessian."""
        mask = batch.get("attention_mask")
        self._mask.keep = None if mask is None else mask.flatten().bool()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off and add up the ranks, site by site in the order of the pass."""
        assert isinstance(pl_module, MoEQuantModule)
        self._stack.close()
        run = pl_module.run
        for part in pl_module.current_pass.parts:
            sum_over_ranks(run.hessians[part.site.name].tensors())
            if part.opens_pool:
                sum_over_ranks(run.pools[part.site.name].tensors())
            if part.shared:
                run.hessians[part.site.name] = shared_by(run.hessians[part.site.name], len(part.experts))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        self._stack.close()
