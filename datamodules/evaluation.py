"""Evaluation sets: windows of text from several domains, and arithmetic problems to be solved by generation."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moeq.documents import read_documents, token_stream
from moeq.tasks.arithmetic import Problem, build_problems, left_pad
from moeq.tasks.text import spread_windows

ARITHMETIC_SET = "arithmetic_exact_match"


def _reference_domains() -> dict[str, str]:
    return {
        "prose": "wikitext2_test.txt",
        "python": "python_heldout.jsonl",
        "gsm8k": "gsm8k_test.jsonl",
        "arithmetic": "arithmetic.txt",
    }


@dataclass(frozen=True)
class EvaluationSpec:
    """What ``validate`` measures.

    Attributes:
        data_dir: Folder of the evaluation files.
        domains: File of each domain: ``.txt`` is one document, ``.jsonl`` one document per line (field ``text``, or
            ``question`` and ``answer``).
        window_length: Tokens per window; windows do not overlap, the first token of each is not scored.
        num_windows: Windows per domain, evenly spread over its text; None is all of them.
        batch_size: Windows, or arithmetic problems, per forward pass.
        arithmetic_file: Lines such as ``37 + 58 = 95`` for the exact-match set; the bundled file has sums only.
        num_arithmetic: Problems in the exact-match set, evenly spread over the file; 0 leaves the set out.
        num_shots: Other lines shown before each problem.
    """

    data_dir: str = "assets/reference-moe/texts"
    domains: dict[str, str] = field(default_factory=_reference_domains)
    window_length: int = 256
    num_windows: int | None = 32
    batch_size: int = 8
    arithmetic_file: str = "arithmetic_sums.txt"
    num_arithmetic: int = 200
    num_shots: int = 4

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise ValueError(f"window_length ({self.window_length}) must be at least 2, since token 1 is not scored")
        if self.num_windows is not None and self.num_windows < 1:
            raise ValueError(f"num_windows ({self.num_windows}) must be positive, or null for all windows")
        if self.batch_size < 1:
            raise ValueError(f"batch_size ({self.batch_size}) must be positive; the usual value is 8")
        if self.num_arithmetic < 0 or self.num_shots < 0:
            raise ValueError(
                f"num_arithmetic ({self.num_arithmetic}) and num_shots ({self.num_shots}) must not be negative; "
                "choose 0 to leave either out"
            )
        if ARITHMETIC_SET in self.domains:
            raise ValueError(f"the domain name {ARITHMETIC_SET} is taken by the exact-match set; choose another")
        if not self.domains and not self.num_arithmetic:
            raise ValueError("domains is empty and num_arithmetic is 0: nothing to evaluate; name a domain")


class RankSampler(Sampler[int]):
    """Items rank, rank + world_size, ... of a data set: in order, none twice, none left out, no padding."""

    def __init__(self, dataset: Sized, rank: int, world_size: int) -> None:
        self._indices = range(rank, len(dataset), world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class EvaluationDataModule(L.LightningDataModule):
    """Validation loaders, one per evaluation set, in the order of ``set_names``.

    Window batches are ``{"input_ids": [B, L]}``; arithmetic batches are ``{"prompt_ids": [B, P], "attention_mask":
    [B, P], "answers": list[str]}``, padded on the left.  The tokenizer is the one of the module under evaluation.
    """

    def __init__(self, evaluation: EvaluationSpec | None = None) -> None:
        """Reads nothing yet: files are opened when the loaders are asked for.

        Args:
            evaluation: The sets; None is the four domains and the arithmetic of the bundled reference model.
        """
        super().__init__()
        self.evaluation = evaluation or EvaluationSpec()

    @property
    def set_names(self) -> list[str]:
        """Names of the evaluation sets: the domains, then the exact-match set."""
        return [*self.evaluation.domains, *([ARITHMETIC_SET] if self.evaluation.num_arithmetic else [])]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per set; under several ranks each sees its share, without duplicates.

        Raises:
            ValueError: A missing or malformed file, or a text shorter than the windows asked for.
        """
        loaders = [self._loader(self._windows(domain)) for domain in self.evaluation.domains]
        if self.evaluation.num_arithmetic:
            loaders.append(self._loader(self._problems(), self._collate_problems))
        return loaders

    @property
    def _tokenizer(self) -> Any:
        assert self.trainer is not None, "the loaders are built by a Trainer"
        return self.trainer.lightning_module.tokenizer

    def _windows(self, domain: str) -> list[dict[str, Tensor]]:
        path = Path(self.evaluation.data_dir) / self.evaluation.domains[domain]
        try:
            ids_T = token_stream(read_documents(path), self._tokenizer)
            windows_NL = spread_windows(ids_T, self.evaluation.window_length, self.evaluation.num_windows)
        except ValueError as error:
            raise ValueError(f"domain {domain} ({path}): {error}") from error
        return [{"input_ids": window_L} for window_L in windows_NL]

    def _problems(self) -> list[Problem]:
        path = Path(self.evaluation.data_dir) / self.evaluation.arithmetic_file
        try:
            lines = [line for document in read_documents(path) for line in document.split("\n") if line.strip()]
            return build_problems(lines, self.evaluation.num_arithmetic, self.evaluation.num_shots)
        except ValueError as error:
            raise ValueError(f"{ARITHMETIC_SET} ({path}): {error}") from error

    def _collate_problems(self, problems: list[Problem]) -> dict[str, Any]:
        tokenizer = self._tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        # A prompt starts as a document does in training: after the begin- or end-of-text token.
        prefix = [] if start is None else [start]
        prompts = [prefix + tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in problems]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        prompt_ids_BP, attention_mask_BP = left_pad(prompts, pad)
        answers = [problem.answer for problem in problems]
        return {"prompt_ids": prompt_ids_BP, "attention_mask": attention_mask_BP, "answers": answers}

    def _loader(self, dataset: list[Any], collate: Any = None) -> DataLoader[Any]:
        assert self.trainer is not None, "the loaders are built by a Trainer"
        sampler = RankSampler(dataset, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(
            cast(Dataset[Any], dataset), batch_size=self.evaluation.batch_size, sampler=sampler, collate_fn=collate
        )
