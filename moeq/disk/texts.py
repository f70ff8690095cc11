"""Text files to documents, documents to one stream of tokens; for calibration and for evaluation alike."""

import gzip
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


def read_documents(path: Path, field: str | None = None) -> list[str]:
    """Documents of a text file (one) or of a JSON-lines file (one per line); both may be gzipped.

    Args:
        path: A .txt, .jsonl, .txt.gz or .jsonl.gz file.
        field: Field of the rows that holds the text; None is ``text``, or ``question`` and ``answer``.

    Raises:
        ValueError: The file is missing, of another kind, malformed or empty, or a row lacks the field.
    """
    kind = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if kind not in CONTENTS:
        raise ValueError(f"text file {path} must end in .txt or .jsonl (or one of them and .gz); rename or convert it")
    if not path.is_file():
        raise ValueError(
            f"no file {path.name} in folder {path.parent}; it should contain {CONTENTS[kind]}; check the path"
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as file:
        if kind == ".jsonl":
            lines = ((line, f"{path}, line {i}") for i, line in enumerate(file, 1) if line.strip())
            documents = [row_text(_row(line, where), field, where) for line, where in lines]
        else:
            documents = [str(file.read())]
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty; it should contain {CONTENTS[kind]}")
    return documents


def token_stream(documents: Sequence[str], tokenizer: Any) -> Tensor:
    """int64 ids_T of all documents, each followed by the end-of-text token; no other special tokens are added."""
    ids: list[int] = []
    for document in documents:
        # verbose=False: no warning that a text is longer than the model's window, since it is cut into windows next.
        ids.extend(tokenizer.encode(document, add_special_tokens=False, verbose=False))
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def row_text(row: Any, field: str | None = None, where: str = "a row") -> str:
    """Text of a row: ``field``, or where that is None ``text``, or ``question`` and ``answer``.

    Raises:
        ValueError: The row has none of them; ``where`` says which row it is.
    """
    given = sorted(row) if isinstance(row, dict) else type(row).__name__
    if (field or "text") in given:
        return str(row[field or "text"])
    if field is None and isinstance(row, dict) and {"question", "answer"} <= row.keys():
        return f"Question: {row['question']}\nAnswer: {row['answer']}"
    expected = CONTENTS[".jsonl"] if field is None else f"one JSON object per line, with a field {field!r}"
    raise ValueError(f"{where} has {given}; it should contain {expected}")


def _row(line: str | bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); it should contain {CONTENTS['.jsonl']}") from error
