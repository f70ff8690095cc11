"""Counts of the tokens that are routed to each expert."""

from contextlib import ExitStack

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from moeq.callback import HookedStep, module_of
from moeq.disk.atomic import write_json
from moeq.distributed import sum_over_ranks
from moeq.models.observe import observe_routing
from moeq.module import MoEQuantModule


class ExpertUsage(HookedStep):
    """Writes expert_usage.json: tokens per expert of every block, on the calibration data.

    Args:
        survey: Count on the original model, in a sweep of its own before anything is quantized; otherwise on inputs
            made by the already quantized part, in the pass that calibrates the experts' inputs.
    """

    affects_weights = False

    def __init__(self, survey: bool = False) -> None:
        super().__init__()
        self.survey = survey

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for a survey."""
        module_of(pl_module).run.needs.survey |= self.survey

    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        """Attach to the experts of the block that this pass sweeps."""
        usage, modules = module.run.usage, self._observed(module)
        for path, experts in modules.items():
            usage[path] = torch.zeros(int(experts.num_experts), dtype=torch.int64, device=module.device)  # type: ignore[arg-type]

        def count(path: str, ids_TK: Tensor, _: Tensor) -> None:
            kept = ids_TK if self.mask.keep is None else ids_TK[self.mask.keep]
            usage[path] += kept.flatten().bincount(minlength=len(usage[path]))

        hooks.enter_context(observe_routing(modules, count))

    def finish(self, module: MoEQuantModule) -> None:
        """Add up the ranks."""
        sum_over_ranks([module.run.usage[path] for path in self._observed(module)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the counts."""
        module = module_of(pl_module)
        if trainer.is_global_zero:
            usage = {path: counts.tolist() for path, counts in module.run.usage.items()}
            write_json(module.run_dir / "expert_usage.json", usage)

    def _observed(self, module: MoEQuantModule) -> dict[str, nn.Module]:
        """Experts modules that are counted in the current pass."""
        current = module.current_pass
        feeds_experts = any(site.kind == "routed" and site.stage == "mlp_in" for site in current.observed)
        if not (current.kind == "survey" if self.survey else feeds_experts):
            return {}
        prefix = f"{module.adapter.block_prefix}.{current.block}."
        return {path: m for path, m in module.adapter.expert_modules().items() if path.startswith(prefix)}
