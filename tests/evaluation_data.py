"""A folder of data with a few invented rows for every task of the catalog, laid out as docs/tasks.md says.

``write_evaluation_data(folder)`` also writes the texts that the domains of ``configs/eval.yaml`` name.  A row of
``tests.tasks.catalog.examples`` is written ``COPIES`` times, each time with a number in front, so that a task has
documents for several ranks and a standard error.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from moeq.tasks.registry import find_task, task_names
from moeq.tasks.task import DataRow
from tests.tasks.catalog.examples import ROWS, SAME, SHOTS

COPIES = 2
# One task is read through gzip.
GZIPPED = "hellaswag"
# The field that a number is put into; in a program it is a comment.
NUMBERED = ("sentence", "premise", "goal", "ctx_a", "question_stem", "Problem", "prompt", "question", "text")
SUMS = [f"{a} + {b} = {a + b}\n" for a in range(7) for b in range(3)]
PAGE = (
    " = Lake {n} = \n \n Lake {n} is 3 @,@ 000 @.@ 5 m deep , and \" cold \" . \n = = Fish = = \n"
    " It has pike ; the lake 's {n} pikes ( big ) are old ! \n"
)  # fmt: skip
# More than two windows of 2048 tokens, a token being a byte.
PAGES = "".join(PAGE.format(n=n) for n in range(40))


def documents_of(name: str) -> list[DataRow]:
    """The rows that a task of the catalog is given, but for texts."""
    rows = ROWS[SAME.get(name, name)]
    return [*rows, *(_numbered(row, copy) for copy in range(1, COPIES) for row in rows)]


def write_evaluation_data(folder: Path) -> Path:
    """Write the files of all tasks; returns ``folder``."""
    for name in task_names():
        source = find_task(name).source
        if source.folder == ".":
            continue
        if source.shots is not None:
            write_rows(folder / source.folder / f"{source.shots.partition('[')[0]}.jsonl", SHOTS[SAME.get(name, name)])
        if source.folder == "wikitext-2-raw":
            write_text(folder / source.folder / "test.txt", PAGES)
        elif source.folder.startswith("c4"):
            texts = [{"text": PAGES[start:]} for start in range(5)] + [{"text": "Short ."}]
            write_rows(folder / source.folder / f"{source.splits[0]}.jsonl", texts)
        else:
            suffix = ".jsonl.gz" if name == GZIPPED else ".jsonl"
            write_rows(folder / source.folder / f"{source.splits[0]}{suffix}", documents_of(name))
    write_text(folder / "arithmetic_sums.txt", "".join(SUMS))
    write_text(folder / "arithmetic.txt", "".join(SUMS))
    write_text(folder / "wikitext2_test.txt", PAGES)
    write_rows(folder / "python_heldout.jsonl", [{"path": "a.py", "text": "import os\n" * 40}])
    write_rows(folder / "gsm8k_test.jsonl", ROWS["gsm8k"])
    return folder


def write_rows(path: Path, rows: Sequence[DataRow]) -> None:
    """One JSON object per line; gzipped where the name says so."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _numbered(row: DataRow, number: int) -> DataRow:
    field = next(name for name in NUMBERED if name in row)
    return {**row, field: f"# {number}\n{row[field]}"}
