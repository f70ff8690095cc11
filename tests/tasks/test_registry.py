"""Names of tasks: the catalog, a user's own, groups."""

import sys
from pathlib import Path

import pytest

from moeq.tasks.registry import GROUPS, expand, find_task, task_names
from tests.tasks.catalog.examples import ROWS, SAME, SHOTS

OWN = """
from dataclasses import replace
from moeq.tasks.registry import find_task
TASK = replace(find_task("piqa"), name="own")
OTHER = replace(TASK, name="other")
TWIN = replace(TASK, name="piqa")
NUMBER = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "shelf_of_tasks").mkdir()
    (tmp_path / "shelf_of_tasks" / "own.py").write_text(OWN, encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shelf_of_tasks", raising=False)
    monkeypatch.delitem(sys.modules, "shelf_of_tasks.own", raising=False)
    return "shelf_of_tasks.own"


def test_names_are_those_of_the_tasks() -> None:
    assert task_names() == sorted(task_names())
    for name in task_names():
        assert find_task(name).name == name
        assert find_task(name).metrics


def test_every_task_has_rows_in_the_tests() -> None:
    assert {*ROWS, *SAME} == set(task_names())
    assert {name for name in task_names() if find_task(name).num_shots} == {*SHOTS, "mmlu_moequant"}


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"unknown task 'helaswag'; did you mean hellaswag\? choose one of arc_challenge, "
    ):
        find_task("helaswag")
    with pytest.raises(ValueError, match=r"unknown task 'zzzz'; choose one of .*moequant.*or your own as"):
        expand(["zzzz"])


def test_groups_are_the_columns_of_the_papers() -> None:
    assert [task.name for task in expand(["quantmoe_bench"])] == [
        "winogrande", "copa", "openbookqa", "hellaswag", "piqa", "mmlu",
    ]  # fmt: skip
    for name, members in GROUPS.items():
        assert name not in task_names()
        assert [task.name for task in expand([name])] == list(members)


def test_a_task_that_is_named_twice_runs_once() -> None:
    assert [task.name for task in expand(["piqa", "quantmoe_bench", "sciq"])] == [
        "piqa", "winogrande", "copa", "openbookqa", "hellaswag", "mmlu", "sciq",
    ]  # fmt: skip


def test_a_users_module_has_tasks(own_module: str) -> None:
    assert find_task(own_module).name == "own"
    assert find_task(f"{own_module}:OTHER").name == "other"
    assert [task.name for task in expand(["sciq", own_module])] == ["sciq", "own"]


def test_what_is_no_task_of_a_users_module_is_refused(own_module: str) -> None:
    with pytest.raises(
        ValueError, match=r"NUMBER of module shelf_of_tasks.own is int, not a task; .*\(TASK, OTHER, TWIN\)"
    ):
        find_task(f"{own_module}:NUMBER")
    with pytest.raises(ValueError, match=r"module 'shelf_of_tasks.missing' cannot be imported"):
        find_task("shelf_of_tasks.missing:TASK")


def test_two_tasks_of_one_name_are_refused(own_module: str) -> None:
    with pytest.raises(ValueError, match="two different tasks are named 'piqa'"):
        expand(["piqa", f"{own_module}:TWIN"])
