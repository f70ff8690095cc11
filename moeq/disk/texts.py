"""Text files to documents, documents to one stream of tokens; for calibration and for evaluation alike."""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTENTS = {
    ".txt": "plain UTF-8 text",
    ".jsonl": 'one JSON object per line, with a field "text" or the fields "question" and "answer"',
}
# A chat, a list of {"role": ..., "content": ...}, and where it stands, to its text.
Render = Callable[[list[Any], str], str]


def read_documents(path: Path, field: str | None = None, render: Render | None = None) -> list[str]:
    """Documents of a text file (one) or of a JSON-lines file (one per line); both may be gzipped.

    Args:
        path: A .txt, .jsonl, .txt.gz or .jsonl.gz file.
        field: Field of the rows that holds the text; None is ``text``, or ``question`` and ``answer``.
        render: Makes a text of a field that holds a chat; None refuses chats.

    Raises:
        ValueError: The file is missing, of another kind, damaged, no UTF-8, malformed or empty, or the field of a row
            is missing or no text.
    """
    kind = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if kind not in CONTENTS:
        raise ValueError(f"text file {path} must end in .txt or .jsonl (or one of them and .gz); rename or convert it")
    if not path.is_file():
        raise ValueError(
            f"no file {path.name} in folder {path.parent}; it should contain {CONTENTS[kind]}; check the path"
        )
    try:
        documents = _documents(path, kind, field, render)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, for example by "
            "iconv -f latin1 -t utf8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"text file {path} is damaged ({error}); copy it again") from error
    if not any(document.strip() for document in documents):
        raise ValueError(f"text file {path} is empty; it should contain {CONTENTS[kind]}")
    return documents


def _documents(path: Path, kind: str, field: str | None, render: Render | None) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as file:
        if kind == ".jsonl":
            lines = ((line, f"{path}, line {i}") for i, line in enumerate(file, 1) if line.strip())
            return [row_text(_row(line, where), field, where, render) for line, where in lines]
        return [str(file.read())]


def token_stream(documents: Sequence[str], tokenizer: Any, *, ends: bool = True) -> Tensor:
    """int64 ids_T of all documents, each followed by the end-of-text token; no other special tokens are added.

    Args:
        documents: Texts.
        tokenizer: Of the model.
        ends: False leaves the end-of-text tokens out, too.
    """
    ids: list[int] = []
    for document in documents:
        # verbose=False: no warning that a text is longer than the model's window, since it is cut into windows next.
        ids.extend(tokenizer.encode(document, add_special_tokens=False, verbose=False))
        if ends and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def row_text(row: Any, field: str | None = None, where: str = "a row", render: Render | None = None) -> str:
    """Text of a row: ``field``, or where that is None ``text``, or ``question`` and ``answer``.

    Args:
        row: Values by field.
        field: That holds the text.
        where: Which row it is, for errors.
        render: Makes a text of a chat; None refuses chats.

    Raises:
        ValueError: The row has none of them, or what it has is no text.
    """
    given = sorted(row) if isinstance(row, dict) else type(row).__name__
    if (field or "text") in given:
        return as_text(row[field or "text"], f"{where}: field {field or 'text'!r}", render)
    if field is None and isinstance(row, dict) and {"question", "answer"} <= row.keys():
        question, answer = (as_text(row[name], f"{where}: field {name!r}") for name in ("question", "answer"))
        return f"Question: {question}\nAnswer: {answer}"
    expected = CONTENTS[".jsonl"] if field is None else f"one JSON object per line, with a field {field!r}"
    chats = [name for name, value in row.items() if is_chat(value)] if isinstance(row, dict) else []
    hint = f"; for its chats give the field {chats[0]}" if chats and render is not None else ""
    raise ValueError(f"{where} has {given}; it should contain {expected}{hint}")


def as_text(value: Any, where: str, render: Render | None = None) -> str:
    """A value that should be a text, or a chat where chats are rendered; raises ValueError for any other."""
    if isinstance(value, str):
        return value
    if is_chat(value) and render is not None:
        return render(value, where)
    what = "a chat" if is_chat(value) else "null" if value is None else f"a {type(value).__name__}"
    remedy = "chats serve for calibration only" if is_chat(value) else "leave such rows out, or name another field"
    raise ValueError(f"{where} is {what}, not a text; {remedy}")


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a content."""
    return (
        isinstance(value, list) and bool(value)
        and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in value)
    )  # fmt: skip


def _row(line: str | bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); it should contain {CONTENTS['.jsonl']}") from error
