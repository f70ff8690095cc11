"""Write what happened in a run: manifest, errors by weight, fallbacks, time and memory by pass, and a summary."""

import time
from collections import Counter, defaultdict

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.plan import plan_cost
from moeq.callback import Step, module_of
from moeq.disk.atomic import write_csv, write_json, write_text
from moeq.disk.versions import installed_versions
from moeq.fit.memory import MemoryRow, peak_memory_bytes, start_peak
from moeq.module import MoEQuantModule


class Record(Step):
    """Writes manifest.json, errors.csv, fallbacks.json, memory.csv and summary.md, and prints the summary.

    memory.csv compares the peak of every pass with what it was expected to take.  Put it last: what callbacks after it
    do at the end of a pass would be left out.
    """

    affects_weights = False

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._base_bytes = self._peak_bytes = 0
        self._memory: list[MemoryRow] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is loaded: what the process takes by itself."""
        device = trainer.strategy.root_device  # where the module is going to be
        start_peak(device)
        self._base_bytes = peak_memory_bytes(device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each pass has a peak of its own."""
        start_peak(pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean relative error of what this pass quantized, as a curve over passes."""
        module = module_of(pl_module)
        names = {name for site in module.current_pass.sites for name in site.weight_names()}
        errors = [row["relative_error"] for row in module.run.errors if row["weight"] in names]
        if errors:
            module.log("fit/relative_error", sum(errors) / len(errors), rank_zero_only=True)
        peak_bytes = peak_memory_bytes(module.device)
        self._peak_bytes = max(self._peak_bytes, peak_bytes)
        self._memory.append(module.walk.memory_row(module.device, peak_bytes - self._base_bytes))
        module.log("fit/peak_memory_gb", peak_bytes / 1e9, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        module = module_of(pl_module)
        if not trainer.is_global_zero:
            return
        folder, run = module.run_dir, module.run
        manifest = {
            "versions": installed_versions(),
            "device": str(module.device),
            "dtype": str(module.adapter.storage_dtype).removeprefix("torch."),
            "compute_dtype": str(module.model.dtype).removeprefix("torch."),
            "seed": torch.initial_seed(),
            "model": {k: v for k, v in module.hparams.items() if not k.startswith("_")},
            "fingerprint": module.walk.resume.fingerprint,
            "seconds_total": time.perf_counter() - self._start,
            "seconds": run.seconds,
            "peak_memory_bytes": max(self._peak_bytes, peak_memory_bytes(module.device)),
        }
        write_json(folder / "manifest.json", manifest)
        write_csv(folder / "errors.csv", run.errors)
        write_csv(folder / "memory.csv", [dict(row) for row in self._memory])
        write_json(folder / "fallbacks.json", [vars(fallback) for fallback in run.fallbacks])
        summary = summary_table(module)
        write_text(folder / "summary.md", summary)
        rank_zero_info(summary)


def summary_table(module: MoEQuantModule) -> str:
    """Markdown: mean relative error and bits by structure, then the cost of the plan and the fallbacks by reason."""
    rows = defaultdict(list)
    for row in module.run.errors:
        rows[row["kind"], row["linear"]].append(row)
    lines = ["", "| structure | linear | weights | mean bits | mean relative error |", "|---|---|---|---|---|"]
    for (kind, linear), group in rows.items():
        bits = sum(row["bits"] for row in group) / len(group)
        error = sum(row["relative_error"] for row in group) / len(group)
        lines.append(f"| {kind} | {linear} | {len(group)} | {bits:.2f} | {error:.5f} |")
    cost = plan_cost(module.run.plan, module.weight_shapes())
    reasons = Counter(fallback.reason for fallback in module.run.fallbacks)
    listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "none"
    lines += ["", f"Average bits {cost.average_bits:.3f} ({cost.bytes / 1e6:.2f} MB). Fallbacks: {listed}.", ""]
    return "\n".join(lines)
