"""Count the tokens that are routed to each expert."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from moeq.disk.atomic import write_json
from moeq.distributed import sum_over_ranks
from moeq.models.observe import observe_routing
from moeq.module import MoEQuantModule


class ExpertUsage(Callback):
    """Writes expert_usage.json: tokens per expert of every block, on the calibration data.

    Args:
        survey: Count on the original model, in a sweep of its own before anything is quantized; otherwise on inputs
            made by the already quantized part, in the pass that calibrates the experts' inputs.
    """

    affects_weights = False

    def __init__(self, survey: bool = False) -> None:
        self.survey = survey
        self._stack = ExitStack()
        self._keep: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for a survey."""
        assert isinstance(pl_module, MoEQuantModule)
        pl_module.survey_requested |= self.survey

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the experts of the block that this pass sweeps."""
        assert isinstance(pl_module, MoEQuantModule)
        usage, modules = pl_module.run.usage, self._observed(pl_module)
        for path, module in modules.items():
            usage[path] = torch.zeros(int(module.num_experts), dtype=torch.int64, device=pl_module.device)  # type: ignore[arg-type]

        def count(path: str, ids_TK: Tensor, _: Tensor) -> None:
            kept = ids_TK if self._keep is None else ids_TK[self._keep]
            usage[path] += kept.flatten().bincount(minlength=len(usage[path]))

        self._stack.enter_context(observe_routing(modules, count))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Padding is routed like tokens, but does not count."""
        mask = batch.get("attention_mask")
        self._keep = None if mask is None else mask.flatten().bool()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off and add up the ranks."""
        assert isinstance(pl_module, MoEQuantModule)
        self._stack.close()
        sum_over_ranks([pl_module.run.usage[path] for path in self._observed(pl_module)])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hooks come off whatever happens."""
        self._stack.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the counts."""
        assert isinstance(pl_module, MoEQuantModule)
        if trainer.is_global_zero:
            usage = {path: counts.tolist() for path, counts in pl_module.run.usage.items()}
            write_json(pl_module.run_dir / "expert_usage.json", usage)

    def _observed(self, module: MoEQuantModule) -> dict[str, nn.Module]:
        """Experts modules that are counted in the current pass."""
        current = module.current_pass
        feeds_experts = any(site.kind == "routed" and site.stage == "mlp_in" for site in current.observed)
        if not (current.kind == "survey" if self.survey else feeds_experts):
            return {}
        prefix = f"{module.adapter.block_prefix}.{current.block}."
        return {path: m for path, m in module.adapter.expert_modules().items() if path.startswith(prefix)}
