"""Write what validate measured: results.json, results.md, scalars and figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.callback import Step, module_of
from moeq.disk.atomic import write_csv
from moeq.disk.folder import MANIFEST
from moeq.disk.identity import model_identity
from moeq.disk.versions import installed_versions
from moeq.models.storage import storage_dtype
from moeq.module import MoEQuantModule
from moeq.preflight.tables import memory_rows
from moeq.report.figures_evaluation import group_bars, task_bars
from moeq.report.gallery import show_figure, show_table
from moeq.report.results import markdown_table, result_row, write_results
from moeq.report.task_report import TaskReport
from moeq.report.task_tables import markdown_tasks

BITS_OF_DTYPE = {"torch.float32": 32.0, "torch.bfloat16": 16.0, "torch.float16": 16.0}


class Results(Step):
    """Writes results.json, results.md and figures after validate, and the tables into the card of an export.

    Reads ``pl_module.validation.reports``, which all ranks have put together; the module logs the numbers themselves.
    """

    affects_weights = False

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Each task has a peak of its own."""
        module = module_of(pl_module)
        if batch_idx == 0:
            name = module.evaluations[dataloader_idx].task.name
            module.run.meter.begin(f"task {name}", name)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """It ends with its last batch."""
        if batch_idx + 1 == trainer.num_val_batches[dataloader_idx]:
            module_of(pl_module).run.meter.end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first rank writes."""
        module = module_of(pl_module)
        reports = module.validation.reports
        if not trainer.is_global_zero:
            return
        write_csv(module.run_dir / "memory_validate.csv", memory_rows(module.forecast, module.run.meter.measured))
        row = result_row(reports, **describe_model(module))
        write_results([row], module.run_dir, reports, setting(trainer, module))
        draw(reports, trainer, module.run_dir)
        rank_zero_info(f"\n{markdown_table([row])}\n{markdown_tasks(reports)}")
        self._add_to_card(module, reports)

    def _add_to_card(self, module: MoEQuantModule, reports: Sequence[TaskReport]) -> None:
        """The card of an export says what was measured of it, where its folder may be written."""
        from moeq.export.card import add_quality

        reference = module.hparams["reference"]
        compared = "" if reference is None else f", beside `{Path(reference).name}`"
        try:
            if add_quality(
                Path(module.hparams["name"]), f"By `validate` of moeq{compared}:\n\n{markdown_tasks(reports)}"
            ):
                rank_zero_info(f"Card: the tables are in {module.hparams['name']}/README.md, too")
        except ValueError as error:
            rank_zero_info(f"Card: {error}")


def draw(reports: Sequence[TaskReport], trainer: Trainer, folder: Path) -> None:
    """Bars and table of all tasks, and bars of the groups of each task that has any."""
    show_table("tasks", markdown_tasks(reports), trainer.loggers, trainer.global_step)
    figures = {"tasks": task_bars(reports)} | {f"{report.name}_groups": group_bars(report) for report in reports}
    for name, figure in figures.items():
        if figure is not None:
            show_figure(name, figure, folder, trainer.loggers, trainer.global_step)


def setting(trainer: Trainer, module: MoEQuantModule) -> dict[str, Any]:
    """Model, options, versions and machine of an evaluation, as JSON-like data."""
    options = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    data = {k: v for k, v in trainer.datamodule.hparams.items() if not k.startswith("_")}  # type: ignore[attr-defined]
    model = {
        "name": options["name"],
        "revision": getattr(module.model.config, "_commit_hash", None),  # of the hub
        # Of the files: not all weights need be in memory.
        "digest": model_identity(options["name"], options["revision"]),
        "reference": options["reference"],
        "placement": {whose: place.kind for whose, place in module.validation.placements.items()},
    }
    known = {
        "model": model,
        "settings": {"model": options, "data": data, "limit_val_batches": trainer.limit_val_batches},
        "versions": installed_versions(),
        "device": str(module.device),
        "dtype": str(storage_dtype(module.model)).removeprefix("torch."),
        "compute_dtype": str(module.model.dtype).removeprefix("torch."),
        "num_ranks": trainer.world_size,
    }
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return plain


def describe_model(module: MoEQuantModule) -> dict[str, Any]:
    """Method, bits and size of the evaluated model: from the manifest of an export, else of the dtype of its files."""
    name = module.hparams["name"]
    manifest = Path(name) / MANIFEST
    bits = BITS_OF_DTYPE.get(str(storage_dtype(module.model)), 16.0)
    known: dict[str, Any] = {
        "method": module.hparams["label"] or name,
        "bits": bits,
        "average_bits": bits,
        "seconds": 0.0,
    }
    if manifest.is_file():
        metadata = json.loads(manifest.read_text(encoding="utf8"))["metadata"]
        known |= {key: metadata[key] for key in known if metadata.get(key) is not None}
    files = list(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    size = sum(path.stat().st_size for path in files)
    if not files:
        stored = ((p, storage_dtype(module.model, name)) for name, p in module.model.named_parameters())
        size = sum(p.numel() * (dtype if p.is_floating_point() else p.dtype).itemsize for p, dtype in stored)
    return {**known, "num_bytes": size}
