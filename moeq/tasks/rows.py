"""Rows of a task's data: of files below a folder, or of a data set of the hub.

A split is the file ``<data_dir>/<folder>/<split>.jsonl`` (one JSON object per line) or ``.txt``, also gzipped.  A line
of a text file is the row that Hugging Face's WikiText has for it: ``{"text": line}`` with its newline, or with "" where
the line is blank.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq.tasks.task import DataRow, Source

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
_SUFFIX = re.compile(r"[.](jsonl|txt)([.]gz)?$")
_PART = re.compile(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Rows:
    """The data of a task.

    Attributes:
        rows: Rows of the evaluated split, as they are stored.
        shots: Rows of the few-shot examples; empty where the task has none.
        split: Name of the evaluated split.
        origin: The file, or the id, configuration and split on the hub, for people to read.
        sha256: Hex digest of the bytes of the file; for the hub of the rows as JSON lines.
        shots_sha256: The same of the split of the examples; "" where the task has none.
    """

    rows: list[DataRow]
    shots: list[DataRow]
    split: str
    origin: str
    sha256: str
    shots_sha256: str = ""


def load_rows(source: Source, data_dir: Path | None) -> Rows:
    """Rows and few-shot rows of a source.

    Args:
        source: Where they are.
        data_dir: Folder of all data sets; None is the hub (or its local cache).

    Raises:
        ValueError: None of the splits exists, the hub cannot be reached or has no copy, or a file is malformed.
    """
    if data_dir is None:
        split, rows, digest = _load_hub(source, source.splits)
        origin = " ".join(filter(None, (source.hub, source.config, split)))
    else:
        path = find_file(source, source.splits, data_dir)
        split, origin = _SUFFIX.sub("", path.name), str(path)
        rows, digest = read_file(path, source.whole)
    if source.shots is None:
        return Rows(rows, [], split, origin, digest)
    name, part = split_part(source.shots)
    if data_dir is None:
        _, shots, shots_digest = _load_hub(source, (name,))
    else:
        shots, shots_digest = read_file(find_file(source, (name,), data_dir))
    return Rows(rows, shots[part], split, origin, digest, shots_digest)


def split_part(split: str) -> tuple[str, slice]:
    """Name and range of ``name`` or ``name[start:stop]``; raises ValueError for anything else."""
    match = _PART.fullmatch(split)
    if match is None:
        raise ValueError(f"split {split!r} must be a name or a part such as 'train[0:8]'; correct the task's source")
    start, stop = (int(bound) if bound else None for bound in match.groups()[1:])
    return match[1], slice(start, stop)


def find_file(source: Source, splits: Sequence[str], data_dir: Path) -> Path:
    """File of the first of ``splits`` that has one.

    Raises:
        ValueError: None has; the message says what is there and what to download.
    """
    folder = data_dir / source.folder
    for split in splits:
        # A split that is a file name is that file and no other of its stem.
        for suffix in ("", ".gz") if split.endswith(ROW_SUFFIXES) else ROW_SUFFIXES:
            path = folder / f"{split}{suffix}"
            if path.is_file():
                return path
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if present is None:
        found = "which does not exist"
    else:
        found = (
            f"which has {', '.join(present[:12])}{', ...' if len(present) > 12 else ''}" if present else "an empty one"
        )
    named = all(split.endswith(ROW_SUFFIXES) for split in splits)
    wanted = " or ".join(split if named else f"{split}.jsonl" for split in splits)
    forms = "(also .gz)" if named else "(or .txt, also .gz)"
    raise ValueError(f"no file {wanted} {forms} in folder {folder}, {found}; {_download(source, splits)}")


def _download(source: Source, splits: Sequence[str]) -> str:
    if source.hub is None:
        return "it has no copy on the hub; correct data_dir"
    part = f"file {source.hub_file}" if source.hub_file else f"split {' or '.join(splits)}"
    return f"download {part} of {_described(source)} there as JSON lines, or leave data_dir out to use the hub"


def _described(source: Source) -> str:
    return f"the data set {source.hub}" + (f" (configuration {source.config})" if source.config else "")


def read_file(path: Path, whole: bool = False) -> tuple[list[DataRow], str]:
    """Rows of one file and the sha256 of its bytes as stored; a text file that counts as a whole is one row.

    Raises:
        ValueError: A line is not a JSON object, the text is not UTF-8, or there is no row.
    """
    stored = path.read_bytes()
    try:
        text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); download it again") from error
    is_text = path.name.removesuffix(".gz").endswith(".txt")
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if is_text and whole and text.strip():
        rows: list[DataRow] = [{"text": text}]
    else:
        rows = _text_rows(lines) if is_text else _json_rows(lines, path)
    if not rows:
        raise ValueError(f"{path} is empty; it should contain one {'line' if is_text else 'JSON object'} per row")
    return rows, hashlib.sha256(stored).hexdigest()


def _text_rows(lines: Iterable[str]) -> list[DataRow]:
    return [{"text": f"{line}\n" if line.strip() else ""} for line in lines]


def _json_rows(lines: Iterable[str], path: Path) -> list[DataRow]:
    rows: list[DataRow] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); correct or download it again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}; each line must be a JSON object")
        rows.append(row)
    return rows


def _load_hub(source: Source, splits: Sequence[str]) -> tuple[str, list[DataRow], str]:
    """(split, rows, sha256 of the rows) of the first of ``splits`` that the hub has."""
    if source.hub is None:
        raise ValueError(
            f"the task's data ({source.folder}/{' or '.join(splits)}) has no copy on the hub; give data_dir, "
            "the folder that contains it"
        )
    from datasets import load_dataset

    problems = []
    for split in splits:
        options: dict[str, Any] = {}
        if source.hub_file:
            # One file is not all that the data set says the split has, on purpose.
            options = {"data_files": {split: source.hub_file}, "verification_mode": "no_checks"}
        try:
            rows = list(load_dataset(source.hub, source.config, split=split, **options))
        except (OSError, ValueError) as error:
            problems.append(f"split {split}: {error}")
            continue
        lines = "".join(json.dumps(row, sort_keys=True, default=str) + "\n" for row in rows)
        return split, rows, hashlib.sha256(lines.encode()).hexdigest()
    raise ValueError(
        f"{_described(source)} could not be loaded from the hub ({'; '.join(problems)}); check the connection, or "
        f"give data_dir, a folder with {source.folder}/{splits[0]}.jsonl"
    )
