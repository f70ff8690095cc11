"""Write the quantized model, read back what was written and compare it."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moeq.allocation.plan import PlanCost, plan_cost
from moeq.callback import Step, module_of
from moeq.disk.atomic import write_json
from moeq.fit.fingerprint import NEUTRAL_SETTINGS
from moeq.fit.preflight import FitWork
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Phase
from moeq.quant.carrier import FORMATS, CarrierMode
from moeq.quant.spec import Fallback

if TYPE_CHECKING:
    from moeq.checkpoint.packed_weight import PackedFormat
    from moeq.export.finished import FinishedModel
    from moeq.export.made import Made
    from moeq.formats.exports import Written

# Stands in the run folder from the first export to the end of the run: what a killed run left may be replaced.
UNFINISHED = "export.unfinished"
# Options that say where a run stands and what it takes, not what it makes.
WITHOUT_EFFECT = {"trainer.default_root_dir", *(f"model.{name}" for name in NEUTRAL_SETTINGS - {"name", "label"})}


class Export(Step):
    """Packed checkpoint in ``export/`` of the run folder, and what is made of it, each verified.

    Args:
        formats: What is written beside the packed checkpoint ("moeq", which always is), in a folder of its name:
            "dense", a plain Hugging Face folder of dequantized weights; "gguf", "compressed-tensors", "mlx", "gptq",
            see docs/serving.md.
        carrier: "exact": files of runtimes hold every value as it was evaluated, in the smallest type that can;
            "native": types of the grids' own widths, where offsets may round.
        overwrite: Replace folders that exist already and are not empty.
        draft: Layers for speculative decoding, which no run quantizes: "keep" copies them from the source's files, byte
            by byte; "drop" leaves them out, and the configuration does not announce them.
    """

    affects_weights = False

    def __init__(
        self,
        formats: Sequence[str] = ("moeq", "dense"),
        carrier: CarrierMode = "exact",
        overwrite: bool = False,
        draft: Literal["keep", "drop"] = "keep",
    ) -> None:
        if draft not in ("keep", "drop"):
            raise ValueError(f"draft ({draft!r}) must be keep or drop; choose keep")
        if carrier not in ("exact", "native"):
            raise ValueError(f"carrier ({carrier!r}) must be exact or native; choose exact")
        if unknown := sorted(set(formats) - {"moeq", "dense", *FORMATS}):
            raise ValueError(f"formats has {unknown[0]!r}; choose among moeq, dense, {', '.join(FORMATS)}")
        self.dense, self.overwrite = "dense" in formats, overwrite
        self.served = [name for name in FORMATS if name in formats]
        self.carrier: CarrierMode = carrier
        self.draft: Literal["keep", "drop"] = draft

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before any work what would be refused at the end."""
        module = module_of(pl_module)
        for folder in self._folders(module.run_dir):
            if folder.exists() and any(folder.iterdir()) and not self._may_replace(module.run_dir):
                raise ValueError(
                    f"{folder} exists and is not empty; set --trainer.default_root_dir to a new folder, "
                    "or overwrite: true for the callback Export"
                )

    def check(self, module: MoEQuantModule) -> None:
        """Refuse a plan that a format cannot hold."""
        if not module.run.needs.evidence:  # else it is decided after the survey
            self._check_formats(module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what a survey decided before anything is solved."""
        module = module_of(pl_module)
        passes = module.walk.schedule[: module.current_epoch]
        if module.current_pass.kind != "survey" and (not passes or passes[-1].kind == "survey"):
            self._check_formats(module)

    def expected(self, module: MoEQuantModule, work: FitWork) -> Sequence[Phase]:
        """Both folders, written and read back."""
        from moeq.export.origin import find_origin
        from moeq.export.preflight import Rates, export_phases
        from moeq.forecast import export_sizes

        rates = None if work.speed is None else Rates(work.speed.read, work.speed.write)
        sizes = replace(export_sizes(work), carried=find_origin(module.model, self.draft).carried_bytes)
        return export_phases(sizes, dense=self.dense, served=self.served, streamed=work.model.streamed, rates=rates)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and verify, on the first rank; the others wait, as the exported folder is one."""
        module = module_of(pl_module)
        if trainer.is_global_zero:
            self._export(module, hidden=trainer.progress_bar_callback is None)
        trainer.strategy.barrier("moeq_export")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run has ended well, with what callbacks after this one write: its folders are not replaced any more."""
        if trainer.is_global_zero:
            (module_of(pl_module).run_dir / UNFINISHED).unlink(missing_ok=True)

    def _may_replace(self, run_dir: Path) -> bool:
        return self.overwrite or (run_dir / UNFINISHED).exists()

    def _folders(self, run_dir: Path) -> list[Path]:
        return [run_dir / name for name in ("export", *(["dense"] if self.dense else []), *self.served)]

    def _check_formats(self, module: MoEQuantModule) -> None:
        from moeq.formats.convert import check_format

        for name in self.served:
            check_format(name, module.model, _grids(module), self.carrier)

    def _export(self, module: MoEQuantModule, *, hidden: bool) -> None:
        start, run = time.perf_counter(), module.run
        if left := sorted(run.plan.keys() - module.walk.resume.grids.keys()):
            raise ValueError(
                f"{len(left)} of {len(run.plan)} planned weights were not quantized, first {left[0]}; "
                "put a method such as GPTQ or RTN into the list of callbacks"
            )
        replace = self._may_replace(module.run_dir)
        write_json(module.run_dir / UNFINISHED, {"pid": os.getpid()})
        written = self._write(module, replace, hidden)
        write_json(module.run_dir / "verification.json", written.verification)
        run.seconds["export"], run.served = time.perf_counter() - start, written.commands
        gaps = {kind: found.get("max_logit_difference", 0.0) for kind, found in written.verification.items()}
        inexact = {kind: gap for kind, gap in gaps.items() if gap}
        for kind, gap in inexact.items():
            detail = f"all tensors equal, logits within {gap:.3g}: the processor's sums have no fixed order"
            run.fallbacks.append(Fallback(kind, "logits equal up to rounding", detail))
        for kind, found in written.verification.items():
            if num_left_out := found.get("num_left_out"):
                detail = f"{num_left_out} beside the language model, which the runtime does not read: drafts, a tower"
                run.fallbacks.append(Fallback(kind, "tensors left out", detail))
        packed = module.run_dir / "export"
        rank_zero_info(f"Export: {packed} written, reloaded and equal{' up to rounding of logits' if inexact else ''}")

    def _write(self, module: MoEQuantModule, replace: bool, hidden: bool) -> "Written":
        from tqdm import tqdm

        from moeq.export.finished import FinishedModel, Progress
        from moeq.export.source_report import source_fallbacks
        from moeq.formats.exports import ExportRequest, write_exports

        def bar(kind: str) -> Progress:
            return lambda blocks, label: tqdm(blocks, desc=f"{kind} export, {label}", unit="block", disable=hidden)

        run, hparams = module.run, module.hparams
        module.adapter.residency.place("cpu")
        source = FinishedModel(module.adapter, module.walk.resume, self.draft)
        run.fallbacks += source_fallbacks(source.origin)
        run.reasons |= source.origin.left_out
        cost = plan_cost(run.plan, module.weight_shapes())
        metadata = {
            "method": hparams["label"], "source": hparams["name"], "bits": cost.code_bits,
            "average_bits": cost.average_bits,
        }  # fmt: skip
        request = ExportRequest(
            module.run_dir, self.dense, self.served, self.carrier, replace, metadata, sum(run.seconds.values()),
            _made(module, cost),
        )  # fmt: skip
        return write_exports(
            source, module.tokenizer, _grids(module), _probe(module), request,
            account=lambda folders: self._account(module, source, folders),
            measure=lambda name: run.meter.phase(name, name), bar=bar,
        )  # fmt: skip

    def _account(self, module: MoEQuantModule, source: "FinishedModel", folders: Mapping[str, Path]) -> None:
        """Write ledger.json, whatever it says; raises where something is amiss."""
        from moeq.export.accounting import make_ledger

        run, origin = module.run, source.origin
        if origin.folder is None:
            return
        grids = {name: grid.label for name, grid in run.plan.items()}
        asked = None if module.hparams["dtype"] == "auto" else getattr(torch, module.hparams["dtype"])
        reasons, code = {**run.reasons, **origin.left_out}, bool(module.hparams["trust_remote_code"])
        ledger, stored = make_ledger(origin.folder, folders, grids, reasons, asked, trust_remote_code=code)
        write_json(module.run_dir / "ledger.json", ledger.to_dict(stored))
        ledger.check()
        run.ledger = ledger.counts


def _probe(module: MoEQuantModule) -> torch.Tensor:
    """Tokens to compare logits on, [2, 32]."""
    return torch.arange(64).remainder(module.model.config.get_text_config().vocab_size).reshape(2, 32)


def _grids(module: MoEQuantModule) -> "dict[str, PackedFormat]":
    from moeq.checkpoint.packed_weight import PackedFormat

    return {name: PackedFormat.of(grid) for name, grid in module.run.plan.items()}


def _made(module: MoEQuantModule, cost: PlanCost) -> "Made":
    from moeq.export.made import Made, command_line, describe_data

    datamodule: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    fingerprint, of_any = module.walk.resume.fingerprint, vars(LightningDataModule())
    options = {name: value for name, value in vars(datamodule).items() if name not in of_any}
    return Made(
        source=module.hparams["name"],
        identity=fingerprint["model"],
        method=module.hparams["label"],
        bits=cost.code_bits,
        average_bits=cost.average_bits,
        data=describe_data(datamodule, options),
        data_digest=fingerprint["data"],
        command=command_line(sys.argv, WITHOUT_EFFECT),
    )
