"""Steps with a time limit each, whose rows are on the disk as soon as they are known.

A step that runs out of time, or fails, keeps the rows it has and the others follow.  Python is interrupted between two
operations (SIGALRM); what waits in a library for the device is ended after a grace by the last limit of all, with every
row on the disk.
"""

import faulthandler
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from benchmarks.lab.tables import Row, markdown
from moeq.disk.atomic import write_json, write_text

GRACE = 15.0  # seconds


@dataclass(frozen=True)
class Setting:
    """What every step is given.

    Attributes:
        device: Of the side that is judged; the other one is the CPU.
        quick: Small shapes, few repeats.
        folder: For models and runs.
    """

    device: torch.device
    quick: bool
    folder: Path


@dataclass(frozen=True)
class Step:
    """Something to find out.

    Attributes:
        name: Of the step.
        seconds: Its limit.
        rows: Finds it, row by row; a row with ``right`` False makes the whole run fail.
    """

    name: str
    seconds: float
    rows: Callable[[Setting], Iterator[Row]]


class OutOfTimeError(Exception):
    """A step has used its time."""


def run_steps(
    steps: Sequence[Step], setting: Setting, total_seconds: float, path: Path, origin: str, started: float
) -> list[Row]:
    """Run steps in their order, writing all rows after each one; returns them.

    Args:
        steps: In order of value.
        setting: Of all of them.
        total_seconds: From ``started``; what is left of it bounds each step.
        path: JSON of rows, with a report beside it.
        origin: Command and machine.
        started: ``time.perf_counter`` when the process began.
    """
    rows: list[Row] = []
    faulthandler.dump_traceback_later(total_seconds + GRACE - (time.perf_counter() - started), exit=True)
    for step in steps:
        left = total_seconds - (time.perf_counter() - started)
        start = time.perf_counter()
        for row in _rows_within(step, setting, min(step.seconds, left)):
            rows.append({"step": step.name, **row, "at": round(time.perf_counter() - start, 2)})
            print(" ".join(f"{name}={_shown(value)}" for name, value in rows[-1].items()), flush=True)
            write(path, rows, origin)
    faulthandler.cancel_dump_traceback_later()
    return rows


def _rows_within(step: Step, setting: Setting, seconds: float) -> Iterator[Row]:
    """Rows of a step, and one that says why there are no more where it did not end by itself."""
    if seconds < 1:
        yield {"what": "not begun", "note": "no time was left"}
        return
    try:
        with _limit(seconds):
            yield from step.rows(setting)
    except OutOfTimeError:
        yield {"what": "stopped", "note": f"after its {seconds:.0f} s"}
    except Exception as error:
        traceback.print_exc()
        yield {"what": "failed", "right": False, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTimeError`` in this thread when the time is over."""

    def over(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write(path: Path, rows: Sequence[Row], origin: str) -> None:
    """Rows as JSON, and the report beside it."""
    write_json(path, {"origin": origin, "rows": list(rows)})
    write_text(path.with_suffix(".md"), f"# moeq on a GPU\n\n{origin}.\n\n{report(rows)}")


def report(rows: Sequence[Row]) -> str:
    """A table for each step, with the columns that its rows have."""
    parts = []
    for name in dict.fromkeys(row["step"] for row in rows):
        own = [row for row in rows if row["step"] == name]
        columns = [key for key in dict.fromkeys(key for row in own for key in row) if key not in ("step", "at")]
        lines = [[_shown(row.get(column, "")) for column in columns] for row in own]
        parts.append(f"## {name}\n\n{markdown(columns, lines)}")
    return "\n".join(parts)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
