"""Tasks by name: those of the catalog, a user's own, and the groups whose columns the papers report."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from types import ModuleType

from moeq.tasks import catalog
from moeq.tasks.task import Task

# Columns of the papers' tables, with the papers' own prompts where these are known and differ from the harness's.
GROUPS: dict[str, tuple[str, ...]] = {
    "moequant": (
        "wikitext2", "c4_windows", "mmlu_moequant", "humaneval_moequant", "gsm8k", "boolq", "hellaswag", "openbookqa",
        "mathqa",
    ),
    "quantmoe_bench": ("winogrande", "copa", "openbookqa", "hellaswag", "piqa", "mmlu"),
}  # fmt: skip


def find_task(name: str) -> Task:
    """The task of a name.

    Args:
        name: A name of the catalog; "package.module" with a ``TASK``, or "package.module:NAME", is the user's own.

    Raises:
        ValueError: There is no such task.
    """
    if "." in name or ":" in name:
        return _own_task(name)
    if name not in _catalog():
        raise ValueError(_unknown(name, _catalog()))
    return _catalog()[name]


def task_names() -> list[str]:
    """Names of the catalog, in alphabetical order."""
    return sorted(_catalog())


def expand(names: Iterable[str]) -> list[Task]:
    """Tasks of names and of names of groups, in order and each once.

    Raises:
        ValueError: There is no such task or group, or two different tasks have one name.
    """
    tasks: dict[str, Task] = {}
    for name in names:
        if "." not in name and ":" not in name and name not in _catalog() and name not in GROUPS:
            raise ValueError(_unknown(name, [*_catalog(), *GROUPS]))
        for member in GROUPS.get(name, (name,)):
            task = find_task(member)
            if tasks.setdefault(task.name, task) is not task:
                raise ValueError(f"two different tasks are named {task.name!r} (one is {member}); rename yours")
    return list(tasks.values())


@cache
def _catalog() -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    for info in pkgutil.iter_modules(catalog.__path__):
        for task in _tasks_of(importlib.import_module(f"{catalog.__name__}.{info.name}")):
            assert task.name not in tasks, f"two tasks of the catalog are named {task.name}"
            tasks[task.name] = task
    return tasks


def _tasks_of(module: ModuleType) -> Iterator[Task]:
    yield from getattr(module, "TASKS", ()) or (module.TASK,)


def _own_task(name: str) -> Task:
    module_name, _, attribute = name.partition(":")
    attribute = attribute or "TASK"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"task {name!r}: module {module_name!r} cannot be imported ({error}); run from the folder that "
            "contains it, or add that folder to PYTHONPATH"
        ) from error
    task = getattr(module, attribute, None)
    if not isinstance(task, Task):
        found = ", ".join(key for key, value in vars(module).items() if isinstance(value, Task)) or "none"
        raise ValueError(
            f"task {name!r}: {attribute} of module {module_name} is {type(task).__name__}, not a task; "
            f"write 'package.module:NAME' with one of its tasks ({found})"
        )
    return task


def _unknown(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown task {name!r}; {hint}choose one of {', '.join(names)}, or your own as 'package.module:NAME'"
