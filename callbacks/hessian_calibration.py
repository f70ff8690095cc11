"""Gather the Hessians of the sites of each pass, weighted by affinity for routed and shared experts (AGQ)."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.calibration.observe import TokenMask, observe
from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Site
from moeq.module import MoEQuantModule
from moeq.quant.hessian import accumulate, empty_state


class HessianCalibration(Callback):
    """Puts sum of affinity ** power * x x^T and token counts per expert into ``run.hessians``, by site.

    The power is ``--model.affinity_power``: 1 is Affinity-Guided Quantization (MoEQuant, Eq. 19), 0 plain GPTQ.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._mask = TokenMask()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)
        sites, hessians = pl_module.current_pass.sites, pl_module.run.hessians
        for site in sites:
            hessians[site.name] = empty_state(site.num_experts, site.in_features, pl_module.device)
        power = float(pl_module.hparams["affinity_power"])

        def on_rows(site: Site, expert: int, x_TI: Tensor, affinity_T: Tensor | None) -> None:
            accumulate(hessians[site.name], expert, x_TI, affinity_T, power)

        self._mask = self._stack.enter_context(observe(pl_module.adapter, sites, on_rows))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding tokens enter no Hessian."""
        mask = batch.get("attention_mask")
        self._mask.keep = None if mask is None else mask.flatten().bool()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off and add up the ranks, site by site in the order of the pass."""
        assert isinstance(pl_module, MoEQuantModule)
        self._stack.close()
        for site in pl_module.current_pass.sites:
            state = pl_module.run.hessians[site.name]
            sum_over_ranks([state.sum_EII, state.num_tokens_E, state.affinity_sum_E, state.affinity_square_sum_E])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        self._stack.close()
