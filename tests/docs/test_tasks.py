"""docs/tasks.md lists the catalog, and its worked example is a task."""

import importlib.util
import re
from pathlib import Path

import pytest

from docs import tasks
from moeq.tasks.registry import GROUPS, find_task
from moeq.tasks.task import MultipleChoice, Outcome

PAGE = tasks.PAGE.read_text(encoding="utf8")
LETTERS = list("ABCDE")
ROWS = [
    {"question": " Where is rain? ", "choices": {"label": LETTERS, "text": list("vwxyz")}, "answerKey": "B"},
    {"question": "Who\nsings?", "choices": {"label": LETTERS, "text": ["a b", *"cdef"]}, "answerKey": "E"},
]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MultipleChoice:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "example_of_the_page.py").write_text(code, encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = find_task("example_of_the_page:TASK")
    assert isinstance(task, MultipleChoice)
    return task


def test_the_table_of_tasks_is_current() -> None:
    assert tasks.updated(PAGE) == PAGE, "out of date; run: python docs/tasks.py"


def test_a_line_says_where_the_rows_are_and_what_is_measured() -> None:
    assert tasks.row(find_task("gsm8k")) == (
        "| `gsm8k` | generation | `gsm8k/test` | `openai/gsm8k`, `main` | 5, random of `train` | "
        "`exact_match_strict`, `exact_match_flexible` | `moequant` |\n"
    )


def test_every_group_is_named() -> None:
    assert all(f"`{name}`" in PAGE for name in GROUPS)


def test_the_worked_example_is_a_task(example: MultipleChoice) -> None:
    context = "Question: Where is rain?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:"
    assert example.pairs(ROWS[0]) == [(context, f" {letter}") for letter in "ABCDE"]
    assert example.score(ROWS[1], [Outcome(-float(9 - i), False) for i in range(5)]) == {"acc": (1.0, 1.0)}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_worked_example_is_the_harness_s_task(example: MultipleChoice) -> None:
    from benchmarks.harness.tasks import harness_task, requests_by_document

    theirs = harness_task("commonsense_qa", ROWS)
    assert requests_by_document(theirs) == [example.pairs(row) for row in ROWS]
    assert [theirs.doc_to_target(row) for row in theirs.eval_docs] == ["ABCDE"[example.answer(row)] for row in ROWS]
