"""Write what happened in a run: manifest, errors by weight, fallbacks, time and memory by pass, and a summary."""

import time
from collections import Counter, defaultdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.plan import plan_cost
from moeq.callback import Step, module_of
from moeq.disk.atomic import write_csv, write_json, write_text
from moeq.disk.versions import installed_versions
from moeq.fit.preflight import sweep_kind
from moeq.module import MoEQuantModule
from moeq.preflight.tables import comparison_table, memory_rows


class Record(Step):
    """Writes manifest.json, errors.csv, fallbacks.json, memory.csv and summary.md, and prints the summary.

    memory.csv and the summary compare what every phase took with what the preflight expected.  Put it last: what
    callbacks after it do at the end of a pass would be left out.
    """

    affects_weights = False

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each sweep has a peak of its own."""
        module = module_of(pl_module)
        module.run.meter.begin(sweep_kind(module.current_pass), module.current_pass.label)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """And so has each solve, which begins after the last batch."""
        module = module_of(pl_module)
        if trainer.is_last_batch and module.current_pass.kind == "calibrate":
            module.run.meter.end()
            module.run.meter.begin("solve", f"{module.current_pass.label} solve")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean relative error of what this pass quantized, as a curve over passes."""
        module = module_of(pl_module)
        meter = module.run.meter
        meter.end()
        names = {name for site in module.current_pass.sites for name in site.weight_names()}
        errors = [row["relative_error"] for row in module.run.errors if row["weight"] in names]
        if errors:
            module.log("fit/relative_error", sum(errors) / len(errors), rank_zero_only=True)
        peak_bytes = max(each.device or each.host for each in meter.measured[-2:])
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
            "peak_memory_bytes": max(each.host for each in run.meter.measured),
            "peak_device_bytes": max(each.device for each in run.meter.measured),
            "hessian_gib": module.walk_spec.hessian_gib,
        }
        write_json(folder / "manifest.json", manifest)
        write_csv(folder / "errors.csv", run.errors)
        write_csv(folder / "memory.csv", memory_rows(module.forecast, run.meter.measured))
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
    if module.forecast is not None:
        lines += ["", comparison_table(module.forecast, module.run.meter.measured)]
    if module.run.ledger:
        fates = ", ".join(f"{count} {fate}" for fate, count in module.run.ledger.items())
        lines += ["", f"Tensors of the source's files: {fates} (ledger.json)."]
    if module.run.served:
        lines += ["", *(f"    {command}" for command in module.run.served.values())]
    lines += ["", f"Average bits {cost.average_bits:.3f} ({cost.bytes / 1e6:.2f} MB). Fallbacks: {listed}.", ""]
    return "\n".join(lines)
