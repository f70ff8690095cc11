"""Calibration on sequences that the model writes itself (expert-balanced self-sampling)."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from datamodules.calibration import CalibrationDataModule, check_positions
from moeq.disk.atomic import copy_file
from moeq.distributed import gather_lists
from moeq.fit.memory import DataShape
from moeq.fit.preflight import FitWork
from moeq.preflight.phases import Phase
from moeq.sampling.balance import is_degenerate
from moeq.sampling.candidates import first_token_candidates
from moeq.sampling.ebss_spec import EBSSSpec, NextToken, Sampled
from moeq.sampling.writer import BITS, WRITERS, Writer, WriterChoice

if TYPE_CHECKING:
    from moeq.sampling.compared_text import ComparedText

NUM_SHOWN = 3


class EBSSDataModule(CalibrationDataModule):
    """Self-sampled calibration sequences, kept in the run folder with a report of their balance.

    Args:
        writer: Who writes them: "original" is the model, whole on the device; "lockstep" gives the same numbers from
            blocks that wait in main memory and visit the device in turn; "packed8" and "packed4" are the model rounded
            to 8 or 4 bits in memory, whose text costs 1% of the divergence or less on the bundled model
            (benchmarks/results/writers_reference.md). "auto" takes the first of these that fits.
        sequences_at_once: Sequences (times branches) per forward pass; bounds the memory of the search. In corpus mode
            ranks divide them, in the other modes each rank takes so many.
        cache_dir: Folder for sampled sequences alone, which runs share; null keeps them in the run folder alone.
        compare_text: A .txt or .jsonl file; the report then has the same columns for as many tokens of it.
        batch_size: Sequences per step of the calibration.
        **settings: Those of ``EBSSSpec``.
    """

    def __init__(
        self,
        writer: WriterChoice = "auto",
        sequences_at_once: int = 64,
        cache_dir: str | None = None,
        compare_text: str | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size)
        self.spec = EBSSSpec(**settings)
        if sequences_at_once < 1:
            raise ValueError(f"sequences_at_once ({sequences_at_once}) must be positive; the usual value is 64")
        self.writer: WriterChoice = writer
        self.sequences_at_once, self.cache_dir, self.compare_text = sequences_at_once, cache_dir, compare_text
        self._settled: tuple[Writer, Path] | None = None
        self._made: tuple[Path, ComparedText | None, Writer] | None = None

    @override
    def shape(self) -> DataShape:
        return DataShape(self.spec.num_sequences, self.spec.length, self.batch_size)

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward pass of the search."""
        return self.sequences_at_once * self.spec.branches

    def expected(self, work: FitWork) -> list[Phase]:
        """What writing them is going to take, for the preflight; nothing where they are there already."""
        from moeq.sampling.preflight import sampling_phase
        from moeq.sampling.writer import choose_writer

        if any((self._run()[1].run_dir / "calibration").glob("ebss-*.safetensors")):
            return []
        sizes = self._sizes()
        writer = self.writer if self.writer != "auto" else choose_writer(sizes) if work.model.streamed else "original"
        step = None if work.speed is None else work.speed.step
        at_once = self.sequences_at_once
        return [
            sampling_phase(
                sizes, writer, self.spec, sequences_at_once=at_once, num_blocks=len(work.model.blocks), step=step
            )
        ]

    @override
    def data_key(self) -> str:
        """Name of the set, which is told from the model, the settings and who writes."""
        return self._place()[1].stem

    @override
    def make_ids(self) -> Tensor:
        from moeq.sampling.store import check_cache, load_sampled

        trainer, module = self._run()
        check_positions(module.model.config, self.spec.length)
        self._share(range(self.spec.num_sequences))  # raises for more ranks than batches
        if self.cache_dir is not None:
            check_cache(Path(self.cache_dir))
        text = self._text()
        writer, path = self._place()
        if trainer.is_global_zero and not path.is_file() and self._shared(path).is_file():
            copy_file(self._shared(path), path)
        trainer.strategy.barrier("moeq_ebss_cache")
        self._write_missing(writer, path, text)
        if trainer.is_global_zero and not self._shared(path).is_file():
            copy_file(path, self._shared(path))
        self._made = path, text, writer
        trainer.strategy.barrier("moeq_ebss")
        if trainer.is_global_zero:
            # Not before the barrier: all ranks have to have read the parts.
            shutil.rmtree(_parts(path), ignore_errors=True)
        return load_sampled(path).ids_NT

    @override
    def begin(self) -> None:
        if self._run()[0].is_global_zero:
            assert self._made is not None, "the sequences are there by now"
            self._report(*self._made)

    def _run(self) -> tuple[Any, Any]:
        assert self.trainer is not None, "the data are made by a Trainer"
        return self.trainer, self.trainer.lightning_module

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._run()[1].model.get_input_embeddings().weight.device
        return device

    def _text(self) -> "ComparedText | None":
        from moeq.sampling.compared_text import ComparedText

        if self.compare_text is None:
            return None
        return ComparedText.read(self.compare_text, self._module.tokenizer, self.spec)

    def _files(self) -> dict[Writer, Path]:
        """Where the set of each writer is in the run folder; original and lockstep have the same."""
        from moeq.sampling.store import model_mark, set_fingerprint

        trainer, module = self._run()
        mark = model_mark(module.adapter, module.hparams["name"], module.hparams.get("revision"))
        sizes = self.sequences_at_once, trainer.world_size
        keys = {writer: set_fingerprint(mark, module.tokenizer, self.spec, *sizes, writer) for writer in WRITERS}
        return {writer: module.run_dir / "calibration" / f"ebss-{key}.safetensors" for writer, key in keys.items()}

    def _place(self) -> tuple[Writer, Path]:
        """Who writes the set, or has written it, and where it is in the run folder; settled once."""
        if self._settled is None:
            files = self._files()
            writer = self._agreed_writer(files)
            self._settled = writer, files[writer]
        return self._settled

    def _shared(self, path: Path) -> Path:
        return path if self.cache_dir is None else Path(self.cache_dir) / path.name

    # -- who writes

    def _agreed_writer(self, files: dict[Writer, Path]) -> Writer:
        """The same on all ranks: the last in the list of those that they would take."""
        from moeq.sampling.writer import rounded_fallback

        writer = max(gather_lists([self._own_writer(files)]), key=WRITERS.index)
        if self.writer == "auto" and writer in BITS:
            self._run()[1].run.fallbacks.append(rounded_fallback(writer))
        return writer

    def _own_writer(self, files: dict[Writer, Path] | None = None) -> Writer:
        """Of this rank, which takes what files tell into account where there are any."""
        from moeq.models.residency import InMemory
        from moeq.sampling.writer import describe_writer, settle_writer

        if self.writer != "auto":
            return self.writer
        if isinstance(self._run()[1].adapter.residency, InMemory):
            return "original"
        sizes, files = self._sizes(), files or {}
        writer = settle_writer(
            sizes,
            finished=[writer for writer, path in files.items() if path.is_file()],
            begun=[writer for writer, path in files.items() if _parts(path).is_dir()],
            shared=[writer for writer, path in files.items() if self._shared(path).is_file()],
        )
        rank_zero_info(describe_writer(writer, sizes))
        return writer

    def _sizes(self) -> Any:
        from moeq.checkpoint.free_memory import free_bytes
        from moeq.sampling.open_writer import writer_sizes

        trainer, module = self._run()
        # Ranks of one machine share its main memory.
        share = max(1, trainer.world_size // trainer.num_nodes)
        host, device = torch.device("cpu"), self._device
        host_free = free_bytes(host) // share
        return writer_sizes(
            module.adapter, device, rows=self.sequences_at_once * self.spec.branches, length=self.spec.length,
            device_free=host_free if device == host else free_bytes(device), host_free=host_free,
        )  # fmt: skip

    # -- writing

    def _write_missing(self, writer: Writer, path: Path, text: "ComparedText | None") -> None:
        """Write the set, and score the text, where that is not done yet; the only time that a whole model is needed."""
        from moeq.sampling.effective import measure_evidence
        from moeq.sampling.open_writer import use_writer
        from moeq.sampling.store import save_sampled

        trainer, module = self._run()
        device, missing = self._device, not path.is_file()
        unscored = trainer.is_global_zero and text is not None and not text.path(path).is_file()

        def use(model: Any) -> None:
            if missing:
                # Ends with a barrier, so no rank looks for the file after the first one has written it.
                sampled = self._sample(model, _parts(path))
                if trainer.is_global_zero:
                    save_sampled(path, sampled, measure_evidence(model, sampled.ids_NT.to(device)))
            if unscored:
                assert text is not None
                text.score(model, path, device)

        if missing or unscored:
            use_writer(module.adapter, writer if missing else self._own_writer(), device, use)

    def _sample(self, model: Any, folder: Path) -> Sampled:
        from tqdm import tqdm

        from moeq.sampling.effective import measure_evidence
        from moeq.sampling.next_token import ModelNextToken
        from moeq.sampling.parts import SetWriter, sample_set

        trainer, module = self._run()
        sampler = SetWriter(
            self.spec,
            self.sequences_at_once,
            candidates_V=first_token_candidates(model, module.tokenizer),
            is_degenerate=lambda ids_NT: [is_degenerate(text) for text in module.tokenizer.batch_decode(ids_NT)],
            evidence=lambda ids_NT: measure_evidence(model, ids_NT.to(self._device)),
            folder=folder,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=lambda: trainer.strategy.barrier("moeq_ebss_parts"),
        )
        # Corpus mode also writes beginnings, and may stop early or draw again: it has no total.
        total = None if self.spec.mode == "corpus" else sampler.missing() * self.spec.length
        hidden = trainer.progress_bar_callback is None
        with (
            ModelNextToken(model) as next_token,
            tqdm(total=total, desc=f"EBSS ({self.spec.mode})", unit="token", disable=hidden) as bar,
        ):
            return sample_set(sampler, _Shown(next_token, bar), self._device)

    def _report(self, path: Path, text: "ComparedText | None", writer: Writer) -> None:
        """``report.json`` beside the ids, and its numbers in the logger: balance, likelihood, repetition, some text."""
        from moeq.disk.atomic import write_json
        from moeq.sampling.set_report import decision_columns, decision_steps, set_columns, set_scalars
        from moeq.sampling.store import load_sampled, load_scored
        from moeq.sampling.writer import identity_of

        trainer, module = self._run()
        decode = module.tokenizer.batch_decode
        sampled = load_sampled(path)
        report: dict[str, Any] = {
            "ids": path.name,
            "writer": identity_of(writer),
            "settings": asdict(self.spec),
            "decisions": decision_columns(sampled.decisions_NS3, sampled.redrawn_N),
            "sampled": set_columns(*load_scored(path), decode),
        }
        if text is not None:
            report["compare_text"] = text.source
            report["text"] = set_columns(*load_scored(text.path(path)), decode)
        report["samples"] = decode(sampled.ids_NT[:NUM_SHOWN])
        write_json(path.parent / "report.json", report)
        if trainer.logger is not None:
            for name in ("decisions", "sampled", "text"):
                trainer.logger.log_metrics(set_scalars(report.get(name, {}), f"ebss_{name}"))
            for step, columns in enumerate(decision_steps(sampled.decisions_NS3)):
                trainer.logger.log_metrics(set_scalars(columns, "ebss_steps"), step=step)


def _parts(path: Path) -> Path:
    """Folder of the parts of a set that is being written."""
    return path.with_suffix(".parts")


class _Shown:
    """A ``NextToken`` that moves a progress bar: every call adds one token to each sequence it was started with."""

    def __init__(self, inner: NextToken, bar: Any) -> None:
        self._inner, self._bar, self._num_sequences = inner, bar, 0

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        self._num_sequences = len(ids_NT)
        self._bar.update(self._num_sequences)
        return self._inner.prefill(ids_NT)

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        self._bar.update(self._num_sequences)
        return self._inner.step(parent_N, token_N)
