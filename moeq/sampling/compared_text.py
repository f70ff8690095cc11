"""Text that a written set is compared with: as many windows of it, scored by the model that wrote the set.

Scores are kept in a file, as the model is gone when the report is written.  Legend: N windows, L tokens of a window.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.disk.digest import digest, tensor_digest
from moeq.disk.texts import read_documents, token_stream
from moeq.sampling.ebss_spec import EBSSSpec, Sampled
from moeq.sampling.effective import measure_evidence
from moeq.sampling.next_token import score_sequences
from moeq.sampling.store import load_sampled, save_sampled
from moeq.sampling.text import text_windows


@dataclass(frozen=True)
class ComparedText:
    """The token ids of a text file, and how windows are drawn from it."""

    source: str
    stream_T: Tensor
    length: int
    seed: int

    @classmethod
    def read(cls, source: str, tokenizer: Any, spec: EBSSSpec) -> "ComparedText":
        """Of a .txt or .jsonl file; raises ValueError where there is no such text."""
        return cls(source, token_stream(read_documents(Path(source)), tokenizer), spec.length, spec.seed)

    def path(self, set_path: Path) -> Path:
        """File of the scores, beside that of the set."""
        return set_path.with_name(f"text-{digest([set_path.stem, tensor_digest(self.stream_T)])}.safetensors")

    def score(self, model: Any, set_path: Path, device: torch.device) -> None:
        """Score as many windows as the finished set has sequences, and write them to the file.

        Raises:
            ValueError: The text has too few tokens.
        """
        ids_NL = text_windows(self.stream_T, self.length, len(load_sampled(set_path).ids_NT), self.seed)
        nll_N, counts_NLE = score_sequences(model, ids_NL.to(device))
        scored = Sampled(
            ids_NL, nll_N, counts_NLE, torch.zeros(len(ids_NL), 0, 3), torch.zeros(len(ids_NL), dtype=torch.int32)
        )
        save_sampled(self.path(set_path), scored, measure_evidence(model, ids_NL.to(device)))
