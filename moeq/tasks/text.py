"""Evaluation text: files to documents, documents to one token stream, the stream to windows.

Documents are joined by the end-of-text token, the stream is cut into non-overlapping windows of L tokens, and where
fewer windows than there are get evaluated, window ``floor(i * N / n)`` for i = 0 .. n-1 spreads them evenly over the
text.  Nothing here is random: the same files and tokenizer give the same windows on every run and every rank.

Shapes: T tokens of the stream, N windows, L tokens per window.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTENTS = {
    ".txt": "plain UTF-8 text",
    ".jsonl": 'one JSON object per line, with a field "text" or the fields "question" and "answer"',
}


def read_documents(path: Path) -> list[str]:
    """Documents of a text file (one document) or of a JSON-lines file (one document per line).

    Raises:
        ValueError: The file is missing, of another kind, empty, or a row has none of the known fields.
    """
    if path.suffix not in CONTENTS:
        raise ValueError(f"evaluation file {path.name} must end in one of {sorted(CONTENTS)}; rename or convert it")
    if not path.is_file():
        raise ValueError(
            f"no file {path.name} in folder {path.parent}; it should contain {CONTENTS[path.suffix]}. "
            "Set data_dir to the folder that holds it, or remove its domain"
        )
    text = path.read_text(encoding="utf8")
    if path.suffix == ".txt":
        documents = [text] if text.strip() else []
    else:
        lines = enumerate(text.split("\n"), start=1)
        documents = [_row_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not documents:
        raise ValueError(f"evaluation file {path} is empty; it should contain {CONTENTS[path.suffix]}")
    return documents


def _row_document(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); it should contain {CONTENTS['.jsonl']}") from error
    if isinstance(row, dict) and "text" in row:
        return str(row["text"])
    if isinstance(row, dict) and {"question", "answer"} <= row.keys():
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    given = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{where} has {given}; it should contain {CONTENTS['.jsonl']}")


def token_stream(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """int64 ids_T of all documents, each followed by the end-of-text token; no other special tokens are added."""
    ids: list[int] = []
    for document in documents:
        # verbose=False: no warning that a text is longer than the model's window, since it is cut into windows next.
        ids.extend(tokenizer.encode(document, add_special_tokens=False, verbose=False))
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def spread_windows(ids_T: Tensor, window_length: int, num_windows: int | None) -> Tensor:
    """Cut a stream into windows_NL, ``num_windows`` of them evenly spread over the text (None is all of them).

    Raises:
        ValueError: The stream is shorter than one window, or has fewer windows than asked for.
    """
    available = ids_T.numel() // window_length
    if available == 0:
        raise ValueError(
            f"the text has {ids_T.numel()} tokens, fewer than one window of {window_length}; "
            f"choose a window_length of at most {max(ids_T.numel(), 2)}, or a longer text"
        )
    windows_NL = ids_T[: available * window_length].view(available, window_length)
    if num_windows is None:
        return windows_NL
    if num_windows > available:
        raise ValueError(
            f"num_windows ({num_windows}) exceeds the {available} windows of {window_length} tokens in the text; "
            f"choose at most {available}, or null for all"
        )
    return windows_NL[torch.arange(num_windows) * available // num_windows]
