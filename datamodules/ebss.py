"""Calibration on sequences that the model writes itself, balanced over its experts (Expert-Balanced Self-Sampling)."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.calibration import CalibrationDataModule
from moeq.disk.atomic import copy_file
from moeq.disk.texts import read_documents, token_stream
from moeq.fit.memory import DataShape
from moeq.sampling.balance import is_degenerate
from moeq.sampling.ebss_spec import EBSSSpec, NextToken, Sampled
from moeq.sampling.text import text_windows

NUM_SHOWN = 3


class EBSSDataModule(CalibrationDataModule):
    """Self-sampled calibration sequences, kept in the run folder with a report of their balance.

    Args:
        sequences_at_once: Sequences (times branches) per forward pass; bounds the memory of the search. In corpus mode
            ranks divide them, in the other modes each rank takes so many.
        cache_dir: Folder for sampled sequences alone, which runs share; null keeps them in the run folder alone.
        compare_text: A .txt or .jsonl file; the report then has the same columns for as many tokens of it.
        batch_size: Sequences per step of the calibration.
        **settings: Those of ``EBSSSpec``.
    """

    def __init__(
        self,
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
        self.sequences_at_once, self.cache_dir, self.compare_text = sequences_at_once, cache_dir, compare_text

    @override
    def shape(self) -> DataShape:
        return DataShape(self.spec.num_sequences, self.spec.length, self.batch_size)

    @override
    def make_ids(self) -> Tensor:
        from moeq.sampling.store import check_cache, load_sampled, save_sampled, set_fingerprint

        assert self.trainer is not None
        trainer, module = self.trainer, self._module()
        _check_positions(module.model, self.spec.length)
        if self.cache_dir is not None:
            check_cache(Path(self.cache_dir))
        key = set_fingerprint(module.model, module.tokenizer, self.spec, self.sequences_at_once, trainer.world_size)
        path = module.run_dir / "calibration" / f"ebss-{key}.safetensors"
        shared = path if self.cache_dir is None else Path(self.cache_dir) / path.name
        if trainer.is_global_zero and not path.is_file() and shared.is_file():
            copy_file(shared, path)
        trainer.strategy.barrier("moeq_ebss_cache")
        if not path.is_file():
            # Ends with a barrier, so no rank looks for the file after the first one has written it.
            sampled = self._sample(path.with_suffix(".parts"))
            if trainer.is_global_zero:
                save_sampled(path, sampled)
        if trainer.is_global_zero:
            if not shared.is_file():
                copy_file(path, shared)
            self._report(path)
        trainer.strategy.barrier("moeq_ebss")
        if trainer.is_global_zero:
            # Not before the barrier: all ranks have to have read the parts.
            shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
        return load_sampled(path).ids_NT

    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    def _sample(self, folder: Path) -> Sampled:
        from tqdm import tqdm

        from moeq.sampling.effective import measure_evidence
        from moeq.sampling.next_token import ModelNextToken
        from moeq.sampling.parts import SetWriter, sample_set

        assert self.trainer is not None
        trainer, module = self.trainer, self._module()
        device = module.model.device
        sampler = SetWriter(
            self.spec,
            self.sequences_at_once,
            candidates_V=first_token_candidates(module.model, module.tokenizer),
            is_degenerate=lambda ids_NT: [is_degenerate(text) for text in module.tokenizer.batch_decode(ids_NT)],
            evidence=lambda ids_NT: measure_evidence(module.model, ids_NT.to(device)),
            folder=folder,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            barrier=lambda: trainer.strategy.barrier("moeq_ebss_parts"),
        )
        # Corpus mode also writes beginnings, and may stop early or draw again: it has no total.
        total = None if self.spec.mode == "corpus" else sampler.missing() * self.spec.length
        hidden = trainer.progress_bar_callback is None
        with (
            ModelNextToken(module.model) as next_token,
            tqdm(total=total, desc=f"EBSS ({self.spec.mode})", unit="token", disable=hidden) as bar,
        ):
            return sample_set(sampler, _Shown(next_token, bar), device)

    def _report(self, path: Path) -> None:
        """``report.json`` beside the ids, and its numbers in the logger: balance, likelihood, repetition, some text."""
        from moeq.disk.atomic import write_json
        from moeq.sampling.next_token import score_sequences
        from moeq.sampling.set_report import decision_columns, decision_steps, set_scalars
        from moeq.sampling.store import load_sampled

        assert self.trainer is not None
        module = self._module()
        sampled = load_sampled(path)
        report: dict[str, Any] = {
            "ids": path.name,
            "settings": asdict(self.spec),
            "decisions": decision_columns(sampled.decisions_NS3, sampled.redrawn_N),
            "sampled": self._columns(sampled.ids_NT, sampled.counts_NLE, sampled.nll_N),
        }
        if self.compare_text is not None:
            stream_T = token_stream(read_documents(Path(self.compare_text)), module.tokenizer)
            ids_NL = text_windows(stream_T, self.spec.length, len(sampled.ids_NT), self.spec.seed)
            nll_N, counts_NLE = score_sequences(module.model, ids_NL.to(module.model.device))
            report["compare_text"] = self.compare_text
            report["text"] = self._columns(ids_NL, counts_NLE.cpu(), nll_N.cpu())
        report["samples"] = module.tokenizer.batch_decode(sampled.ids_NT[:NUM_SHOWN])
        write_json(path.parent / "report.json", report)
        if self.trainer.logger is not None:
            for name in ("decisions", "sampled", "text"):
                self.trainer.logger.log_metrics(set_scalars(report.get(name, {}), f"ebss_{name}"))
            for step, columns in enumerate(decision_steps(sampled.decisions_NS3)):
                self.trainer.logger.log_metrics(set_scalars(columns, "ebss_steps"), step=step)

    def _columns(self, ids_NL: Tensor, counts_NLE: Tensor, nll_N: Tensor) -> dict[str, Any]:
        from moeq.sampling.effective import measure_evidence
        from moeq.sampling.set_report import set_columns

        module = self._module()
        evidence = measure_evidence(module.model, ids_NL.to(module.model.device))
        return set_columns(ids_NL, counts_NLE, nll_N, evidence, module.tokenizer.batch_decode(ids_NL))


def first_token_candidates(model: Any, tokenizer: Any) -> Tensor:
    """Ids that a sequence may start with: known to both tokenizer and model, no special tokens."""
    num_tokens = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    allowed_V = torch.ones(num_tokens, dtype=torch.bool)
    allowed_V[[i for i in tokenizer.all_special_ids if i < num_tokens]] = False
    return allowed_V.nonzero().squeeze(1)


def _check_positions(model: Any, length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length ({length}) must not exceed the {limit} positions of the model; choose {limit}")


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
