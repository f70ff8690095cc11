"""Refit each router to the original's decisions, once the attention before it is quantized."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from moeq.distributed import sum_over_ranks
from moeq.fit.solve import change_parameters
from moeq.module import MoEQuantModule
from moeq.quant.router_fit import RouterState, add_router_inputs, empty_router_state, refit_router
from moeq.quant.spec import Fallback


class RouterCalibration(Callback):
    """Gives routers the weights whose logits on quantized inputs match the original's best (in the manner of QESC).

    One pass more per block for the original's logits and one for the fit.  Routers stay in full precision.

    Args:
        ridge: Pull toward the old weight, as a share of the mean diagonal of the Gram matrix of the inputs.
    """

    def __init__(self, ridge: float = 0.1) -> None:
        if not 0.0 < ridge < float("inf"):
            raise ValueError(f"ridge ({ridge}) must be positive and finite; usual values are 0.01 to 1")
        self.ridge = ridge
        self._stack = ExitStack()
        self._batch, self._keep = 0, cast(Tensor | None, None)
        self._logits: dict[tuple[str, int], Tensor] = {}
        self._states: dict[str, RouterState] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the passes."""
        assert isinstance(pl_module, MoEQuantModule)
        pl_module.originals_requested = pl_module.routers_requested = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the routers of a block, in the passes made for it."""
        assert isinstance(pl_module, MoEQuantModule)
        current, adapter = pl_module.current_pass, pl_module.adapter
        if current.kind not in ("original", "router"):
            return
        if current.kind == "original":
            self._logits.clear()  # those of the block before, which a resumed run records and never needs
        for name, router in adapter.routers(current.block).items():
            weight_ED = adapter.model.get_parameter(f"{name}.weight")
            if current.kind == "router":
                self._states[name] = empty_router_state(len(weight_ED), weight_ED.shape[1], pl_module.device)
            act = self._add if current.kind == "router" else self._keep_logits
            self._attach(router, act, name, weight_ED)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding tokens do not count."""
        mask = batch.get("attention_mask")
        self._batch, self._keep = batch_idx, None if mask is None else mask.flatten().bool()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off; after the pass of the routers, refit them."""
        assert isinstance(pl_module, MoEQuantModule)
        self._stack.close()
        current, run = pl_module.current_pass, pl_module.run
        if current.kind != "router":
            return
        for name, state in self._states.items():
            sum_over_ranks([state.gram_DD, state.cross_ED, state.before, state.num_tokens])
            weight_ED, share = refit_router(pl_module.model.get_parameter(f"{name}.weight"), state, self.ridge)
            change_parameters(pl_module.adapter, run, {f"{name}.weight": weight_ED})
            pl_module.log("router/logit_error_left", share, rank_zero_only=True)
        if not self._states:
            routed = next(site for site in pl_module.adapter.sites(current.block) if site.kind == "routed")
            name = routed.weight_names()[0]
            run.fallbacks.append(Fallback(name, "router not calibrated", "it has no single weight row per expert"))
        self._states.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        self._stack.close()

    def _attach(self, router: nn.Module, act: Callable[[str, Tensor, Tensor], None], name: str, weight: Tensor) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows_TD = args[0].detach().flatten(0, -2)
            act(name, weight, rows_TD if self._keep is None else rows_TD[self._keep])

        self._stack.callback(router.register_forward_pre_hook(hook).remove)

    def _keep_logits(self, name: str, weight_ED: Tensor, x_TD: Tensor) -> None:
        self._logits[name, self._batch] = F.linear(x_TD.float(), weight_ED.float()).cpu()

    def _add(self, name: str, weight_ED: Tensor, x_TD: Tensor) -> None:
        add_router_inputs(self._states[name], weight_ED, x_TD, self._logits[name, self._batch].to(x_TD.device))
