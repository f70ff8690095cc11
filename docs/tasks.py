"""Keep the table of docs/tasks.md true: ``python docs/tasks.py`` rewrites it from the catalog."""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moeq.tasks.registry import GROUPS, find_task, task_names  # noqa: E402
from moeq.tasks.task import (  # noqa: E402
    Cloze,
    Code,
    Generation,
    LastWord,
    MultipleChoice,
    Rolling,
    Source,
    Task,
    Windows,
)

PAGE = ROOT / "docs" / "tasks.md"
BEGIN, END = "<!-- tasks:begin -->\n", "<!-- tasks:end -->"
# The first that a task is an instance of.
KINDS: dict[type[Task], str] = {
    Cloze: "cloze",
    MultipleChoice: "multiple choice",
    LastWord: "last word",
    Windows: "windows of text",
    Rolling: "whole texts",
    Code: "programs",
    Generation: "generation",
}
HEAD = (
    "| task | kind | files in data_dir | on the hub | examples | metrics | also in |\n"
    "| ---- | ---- | ----------------- | ---------- | -------- | ------- | ------- |\n"
)


def row(task: Task) -> str:
    """Line of the table."""
    kind = next(name for of_kind, name in KINDS.items() if isinstance(task, of_kind))
    source = task.source
    folder = "" if source.folder == "." else f"{source.folder}/"
    files = " or ".join(f"`{folder}{split}`" for split in source.splits)
    groups = ", ".join(f"`{name}`" for name, members in GROUPS.items() if task.name in members)
    metrics = ", ".join(f"`{metric}`" for metric in task.metrics)
    return f"| `{task.name}` | {kind} | {files} | {_hub(source)} | {_shots(task)} | {metrics} | {groups} |\n"


def _hub(source: Source) -> str:
    if source.hub is None:
        return "none"
    return f"`{source.hub}`" + (f", `{source.config}`" if source.config else "")


def _shots(task: Task) -> str:
    if not task.num_shots:
        return "0"
    return f"{task.num_shots}, {task.shot_sampler} of `{task.source.shots}`"


def table() -> str:
    """The table of all tasks."""
    return HEAD + "".join(_rows())


def _rows() -> Iterator[str]:
    for name in task_names():
        yield row(find_task(name))


def updated(page: str) -> str:
    """The page with the table of the present catalog."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf8")), encoding="utf8")
