"""Finished documents on disk, from which an interrupted evaluation goes on.

Each rank appends to a file of its own, ``documents/<task>.rank<r>.jsonl`` in the run folder: a header line with the
task and the fingerprint, then a line per ``Result``, on disk at the end of every batch.  A run that starts again reads
the files of all ranks, however many it has itself.  What a kill left at the end of a file (a line without its end) is
dropped, counted and computed again.  Results of another fingerprint are never mixed in: such a file is ignored, and
renamed before its rank writes; going back to those settings finds it again.

JSON keeps floats exactly (``repr`` is the shortest text that reads back as the same float64); NaN and infinities, which
it has no text for, are refused.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moeq.disk.atomic import sync
from moeq.disk.digest import digest
from moeq.evaluation.result_digest import differences
from moeq.tasks.documents import Document, Result


def reuse(finished: Mapping[str, Result], documents: Iterable[Document]) -> tuple[list[Result], list[Document]]:
    """Results of the documents that are finished, under their own index and groups, and the documents that are not.

    Equal rows of a task share a key, and one result serves them all.
    """
    results, left = [], []
    for document in documents:
        if (result := finished.get(document.key)) is None:
            left.append(document)
        else:
            results.append(replace(result, index=document.index, groups=document.groups))
    return results, left


@dataclass(frozen=True)
class _File:
    """What a file holds: its fingerprint (None: no readable header), its results, and the bytes they take."""

    fingerprint: str | None
    results: tuple[Result, ...]
    good_bytes: int
    num_dropped: int


class Records:
    """The finished documents of one task.

    Args:
        folder: The run folder, which all ranks share.
        task: Name of the task.
        fingerprint: See ``moeq.evaluation.result_digest``.
        rank: Rank of this process; it writes the files of this rank only.
        restart: Pass over what is finished, which ``begin`` deletes.

    Attributes:
        notes: What a person should be told: what was dropped, ignored or renamed, and why.
    """

    def __init__(self, folder: Path, task: str, fingerprint: str, rank: int, *, restart: bool = False) -> None:
        self.folder, self.task, self.fingerprint = folder / "documents", task, fingerprint
        self.path = self._path(rank)
        self.notes: list[str] = []
        self._rank, self._restart = rank, restart
        self._opened = False

    def finished(self) -> dict[str, Result]:
        """Results of all ranks by the key of their document.

        Every rank has to have read them before any of them adds to them: put a barrier in between.
        """
        results: dict[str, Result] = {}
        for path in self._paths():
            file = _read(path)
            if self._restart and file.fingerprint in (self.fingerprint, None):
                continue
            if file.fingerprint == self.fingerprint:
                results |= {result.key: result for result in file.results}
            elif file.fingerprint is not None:
                why = "; ".join(differences(file.fingerprint, self.fingerprint))
                self.notes.append(f"{path}: {len(file.results)} documents of another evaluation are not used ({why})")
            if file.num_dropped:
                self.notes.append(
                    f"{path}: {file.num_dropped} unreadable lines at its end, left by a kill, are dropped"
                )
        return results

    def add(self, results: Sequence[Result]) -> None:
        """Append the results of a batch; they are on disk when this returns.

        Raises:
            ValueError: A value is not finite, or no JSON value.
        """
        lines = "".join(f"{self._line(result)}\n" for result in results)
        if not lines:
            return
        if not self._opened:
            self._open()
        _append(self.path, lines)

    def begin(self) -> None:
        """Before the first document: one rank deletes what is to be started over, now that nothing refuses the run."""
        if self._restart:
            self.clear()

    def clear(self) -> None:
        """Forget the results of this fingerprint, those of all ranks; one rank does it, before any of them adds."""
        for path in self._paths():
            if _read(path).fingerprint in (self.fingerprint, None):
                path.unlink(missing_ok=True)
        self._opened = False

    def _line(self, result: Result) -> str:
        try:
            return json.dumps(asdict(result), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the result of task {self.task}, document {result.index}, cannot be kept ({error}): {result.values}; "
                "a task's score must return finite numbers, and details of plain JSON values"
            ) from error

    def _open(self) -> None:
        """Make this rank's file ready to append to: of this fingerprint, and without a torn end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            file = _read(self.path)
            if file.fingerprint is None:
                self.path.unlink()
            elif file.fingerprint == self.fingerprint:
                os.truncate(self.path, file.good_bytes)
            else:
                aside = self._path(self._rank, file.fingerprint)
                os.replace(self.path, aside)
                self.notes.append(f"{self.path}, of another evaluation, is kept as {aside.name}")
        before = self._path(self._rank, self.fingerprint)
        if before.is_file() and not self.path.is_file():
            os.truncate(before, _read(before).good_bytes)
            os.replace(before, self.path)
        if not self.path.is_file():
            _append(self.path, json.dumps({"task": self.task, "fingerprint": self.fingerprint}) + "\n")
            sync(self.folder)
        self._opened = True

    def _path(self, rank: int, fingerprint: str | None = None) -> Path:
        """File of a rank, or the name under which it is kept for another time."""
        kept = "" if fingerprint is None else f".{digest(fingerprint)}"
        return self.folder / f"{quote(self.task, safe='')}.rank{rank}{kept}.jsonl"

    def _paths(self) -> list[Path]:
        name = re.compile(rf"{re.escape(quote(self.task, safe=''))}\.rank\d+(\.[0-9a-f]{{16}})?\.jsonl")
        return sorted(path for path in self.folder.glob("*.jsonl") if name.fullmatch(path.name))


def _read(path: Path) -> _File:
    """Results of a file up to its first line that is not whole: what a kill or a power cut left behind it."""
    *lines, torn = path.read_bytes().split(b"\n")
    fingerprint: str | None = None
    results: list[Result] = []
    good_bytes = num_good = 0
    for line in lines:
        try:
            content = json.loads(line)
            if num_good == 0:
                fingerprint = str(content["fingerprint"])
            else:
                results.append(_result(content))
        except (ValueError, KeyError, TypeError):
            break
        num_good += 1
        good_bytes += len(line) + 1
    return _File(fingerprint, tuple(results), good_bytes, len(lines) - num_good + bool(torn))


def _result(content: Any) -> Result:
    groups = tuple(content.pop("groups"))
    values = {name: (total, weight) for name, (total, weight) in content.pop("values").items()}
    return Result(groups=groups, values=values, **content)


def _append(path: Path, text: str) -> None:
    """One write, which reaches the disk before this returns."""
    with path.open("ab", buffering=0) as file:
        file.write(text.encode("ascii"))
        os.fsync(file.fileno())
