"""Refit of each router to the original's decisions, once the attention before it is quantized."""

from collections.abc import Callable
from contextlib import ExitStack

import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from moeq.callback import HookedStep, module_of
from moeq.distributed import sum_over_ranks
from moeq.fit.solve import change_parameters
from moeq.module import MoEQuantModule
from moeq.quant.router_fit import RouterState, add_router_inputs, empty_router_state, refit_router
from moeq.quant.spec import Fallback

REFITTED = "refitted to the decisions of the original"


class RouterCalibration(HookedStep):
    """Gives routers the weights whose logits on quantized inputs match the original's best (in the manner of QESC).

    One pass more per block for the original's logits and one for the fit.  Routers stay in full precision.

    Args:
        ridge: Pull toward the old weight, as a share of the mean diagonal of the Gram matrix of the inputs.
    """

    def __init__(self, ridge: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < ridge < float("inf"):
            raise ValueError(f"ridge ({ridge}) must be positive and finite; usual values are 0.01 to 1")
        self.ridge = ridge
        self._logits: dict[tuple[str, int], Tensor] = {}
        self._states: dict[str, RouterState] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the passes."""
        needs = module_of(pl_module).run.needs
        needs.originals = needs.routers = True

    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        """Attach to the routers of a block, in the passes made for it."""
        current, adapter = module.current_pass, module.adapter
        if current.kind not in ("original", "router"):
            return
        if current.kind == "original":
            self._logits.clear()  # those of the block before, which a resumed run records and never needs
        for name, router in adapter.routers(current.block).items():
            weight_ED = adapter.model.get_parameter(f"{name}.weight")
            if current.kind == "router":
                self._states[name] = empty_router_state(len(weight_ED), weight_ED.shape[1], module.device)
            act = self._add if current.kind == "router" else self._keep_logits
            hooks.callback(router.register_forward_pre_hook(self._hook(act, name, weight_ED)).remove)

    def finish(self, module: MoEQuantModule) -> None:
        """Refit the routers after their pass."""
        current, run = module.current_pass, module.run
        if current.kind != "router":
            return
        for name, state in self._states.items():
            sum_over_ranks([state.gram_DD, state.cross_ED, state.before, state.num_tokens])
            weight_ED, share = refit_router(module.model.get_parameter(f"{name}.weight"), state, self.ridge)
            change_parameters(module.adapter, run, {f"{name}.weight": weight_ED}, REFITTED)
            module.log("router/logit_error_left", share, rank_zero_only=True)
        if not self._states:
            routed = next(site for site in module.adapter.sites(current.block) if site.kind == "routed")
            name = routed.weight_names()[0]
            run.fallbacks.append(Fallback(name, "router not calibrated", "it has no single weight row per expert"))
        self._states.clear()

    def _hook(self, act: Callable[[str, Tensor, Tensor], None], name: str, weight_ED: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows_TD = args[0].detach().flatten(0, -2)
            act(name, weight_ED, rows_TD if self.mask.keep is None else rows_TD[self.mask.keep])

        return hook

    def _keep_logits(self, name: str, weight_ED: Tensor, x_TD: Tensor) -> None:
        self._logits[name, self.batch_idx] = F.linear(x_TD.float(), weight_ED.float()).cpu()

    def _add(self, name: str, weight_ED: Tensor, x_TD: Tensor) -> None:
        add_router_inputs(self._states[name], weight_ED, x_TD, self._logits[name, self.batch_idx].to(x_TD.device))
