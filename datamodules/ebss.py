"""Calibration on sequences that the model writes itself, balanced over its experts (Expert-Balanced Self-Sampling)."""

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.calibration import CalibrationDataModule
from datamodules.evaluation import EvaluationSpec
from moeq.calibration.balance import balance_columns
from moeq.calibration.ebss import draw_first_tokens, search
from moeq.calibration.spec import EBSSSpec, Mode, NextToken, Sampled
from moeq.calibration.text import read_documents, text_windows
from moeq.tasks.text import token_stream

NUM_SHOWN = 3


class EBSSDataModule(CalibrationDataModule):
    """Self-sampled calibration sequences, kept in the run folder with a report of their balance; validation sets.

    Args:
        num_sequences: Sequences to write.
        length: Tokens per sequence.
        branches: Branches per sequence that the search keeps (w of the paper).
        tau: Divides the expert imbalance in the cost of a branch; a large tau is little balance.
        prefix_length: Tokens that are grown before a sequence branches.
        mode: stochastic draws the text; paper always takes the most likely tokens, and a small model then loops.
        temperature: Of the drawing.
        balance: False leaves the expert imbalance out of the cost.
        seed: Of first tokens and draws.
        sequences_at_once: Sequences (times branches) per forward pass; bounds the memory of the search.
        cache_dir: Folder that runs share their sequences in; null keeps them in the run folder alone.
        compare_text: A .txt or .jsonl file; the report then has the same columns for as many tokens of it.
        batch_size: Sequences per step of the calibration.
        evaluation: Evaluation sets of validate; null is those of the bundled model.
    """

    def __init__(
        self,
        num_sequences: int = 128,
        length: int = 512,
        branches: int = 4,
        tau: float = 1.2,
        prefix_length: int = 4,
        mode: Mode = "stochastic",
        temperature: float = 1.0,
        balance: bool = True,
        seed: int = 0,
        sequences_at_once: int = 64,
        cache_dir: str | None = None,
        compare_text: str | None = None,
        batch_size: int = 8,
        evaluation: EvaluationSpec | None = None,
    ) -> None:
        super().__init__(batch_size, evaluation)
        self.spec = EBSSSpec(num_sequences, length, branches, tau, prefix_length, mode, temperature, balance, seed)
        if sequences_at_once < 1:
            raise ValueError(f"sequences_at_once ({sequences_at_once}) must be positive; the usual value is 64")
        self.sequences_at_once, self.cache_dir, self.compare_text = sequences_at_once, cache_dir, compare_text

    @override
    def make_ids(self) -> Tensor:
        from moeq.calibration.store import fingerprint, load_sampled

        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        _check_positions(module.model, self.spec.length)
        name = f"ebss-{fingerprint(module.model, module.tokenizer, self.spec, self.sequences_at_once)}.safetensors"
        path = module.run_dir / "calibration" / name
        if self.trainer.is_global_zero:
            self._provide(path)
            self._report(path)
        # The ranks wait for the file that the first one writes.
        self.trainer.strategy.barrier("moeq_ebss")
        return load_sampled(path).ids_NT

    def _provide(self, path: Path) -> None:
        from moeq.calibration.store import save_sampled

        shared = path if self.cache_dir is None else Path(self.cache_dir) / path.name
        if not path.is_file() and not shared.is_file():
            save_sampled(shared, self._sample())
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            shutil.copyfile(shared, temporary)
            temporary.replace(path)

    def _sample(self) -> Sampled:
        from tqdm import tqdm

        from moeq.calibration.next_token import ModelNextToken

        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        generator = torch.Generator().manual_seed(self.spec.seed)
        candidates_V = first_token_candidates(module.model, module.tokenizer)
        first_N = draw_first_tokens(candidates_V, self.spec.num_sequences, generator).to(module.model.device)
        with (
            ModelNextToken(module.model) as next_token,
            tqdm(
                total=self.spec.num_sequences * self.spec.length,
                desc=f"EBSS ({self.spec.mode})",
                unit="token",
                disable=self.trainer.progress_bar_callback is None,
            ) as bar,
        ):
            shown = _Shown(next_token, bar)
            parts = [search(shown, self.spec, part, generator) for part in first_N.split(self.sequences_at_once)]
        return Sampled(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sampled)})

    def _report(self, path: Path) -> None:
        """``report.json`` beside the ids: balance, likelihood and repetition, and a few sequences as text."""
        from moeq.calibration.next_token import score_sequences
        from moeq.calibration.store import load_sampled
        from moeq.run import write_json

        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        sampled = load_sampled(path)
        texts = module.tokenizer.batch_decode(sampled.ids_NT)
        report: dict[str, Any] = {
            "ids": path.name,
            "settings": asdict(self.spec),
            "sampled": balance_columns(sampled.counts_NLE, sampled.nll_N, self.spec.length, texts),
        }
        if self.compare_text is not None:
            stream_T = token_stream(read_documents(Path(self.compare_text)), module.tokenizer)
            ids_NL = text_windows(stream_T, self.spec.length, self.spec.num_sequences, self.spec.seed)
            nll_N, counts_NLE = score_sequences(module.model, ids_NL.to(module.model.device))
            words = module.tokenizer.batch_decode(ids_NL)
            report["compare_text"] = self.compare_text
            report["text"] = balance_columns(counts_NLE, nll_N, self.spec.length, words)
        write_json(path.parent / "report.json", {**report, "samples": texts[:NUM_SHOWN]})


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
    """A ``NextToken`` that moves a progress bar: every call adds one token to each sequence."""

    def __init__(self, inner: NextToken, bar: Any) -> None:
        self._inner, self._bar, self._num_sequences = inner, bar, 0

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        self._num_sequences = len(ids_NT)
        self._bar.update(self._num_sequences)
        return self._inner.prefill(ids_NT)

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        self._bar.update(self._num_sequences)
        return self._inner.step(parent_N, token_N)
