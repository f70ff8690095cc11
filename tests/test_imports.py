"""Imports go one way: one table of rooms, and who may import whom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room, a folder of plain torch, and the rooms below it that it may import.  Two wings (fit, survey, sampling,
# allocation, tuning, export, formats, timing; evaluation, scoring, tasks, programs, report) stand on one cellar and do
# not see each other, except that a survey measures what a width does to a model's predictions (survey -> scoring).
MAY_IMPORT: dict[str, set[str]] = {
    "disk": set(),
    "kernels": set(),
    "programs": set(),
    "decoding": set(),
    "quant": {"kernels"},
    "models": {"quant"},
    "checkpoint": {"models", "quant", "kernels", "disk"},
    "allocation": {"quant"},
    "preflight": set(),
    "sampling": {"checkpoint", "decoding", "models", "quant", "disk", "preflight"},
    "fit": {"allocation", "models", "quant", "kernels", "disk", "preflight"},
    "survey": {"allocation", "scoring", "fit", "models", "quant", "disk", "preflight"},
    "tuning": {"fit", "models", "quant", "disk", "preflight"},
    "export": {"checkpoint", "models", "quant", "disk", "preflight"},
    "formats": {"export", "checkpoint", "models", "quant", "disk"},
    "timing": {"allocation", "checkpoint", "models", "quant", "disk"},
    "tasks": {"disk"},
    "report": {"tasks", "disk"},
    "scoring": {"tasks", "decoding", "models", "kernels", "disk"},
    "evaluation": {
        "scoring",
        "tasks",
        "decoding",
        "programs",
        "report",
        "checkpoint",
        "models",
        "kernels",
        "disk",
        "preflight",
    },
}
# The loose files of moeq/: distributed is torch alone, and open to all; the others are the Lightning shell.
OPEN_TO_ALL = "distributed"
SHELL = {
    "callback", "cli", "forecast", "forecast_validation", "lifeline", "mistakes", "module", "own_sequences", "progress",
    "run_folder", "strategy", "trainer_options",
}  # fmt: skip
WITHOUT_TRANSFORMERS = {"quant", "allocation", "tasks", "programs", "report", "kernels", "disk"}
HEAVY = {"transformers", "datasets", "matplotlib"}
LIGHTNING = {"lightning", "pytorch_lightning"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ("." * node.level) + (node.module or "")
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def roots_of(path: Path) -> set[str]:
    """First parts of the imported names."""
    return {name.split(".")[0] for name in imports_of(path)}


def rooms_of(path: Path) -> set[str]:
    """Rooms and loose files of moeq that a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("moeq.")}


def python_files(folder: str) -> list[Path]:
    """Every Python file below ``folder``."""
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_table_names_every_room_and_every_loose_file() -> None:
    folders = {path.name for path in (ROOT / "moeq").iterdir() if (path / "__init__.py").is_file()}
    assert folders == MAY_IMPORT.keys()
    loose = {path.stem for path in (ROOT / "moeq").glob("*.py")} - {"__init__"}
    assert loose == SHELL | {OPEN_TO_ALL}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_rooms_below_it_and_no_lightning(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room, OPEN_TO_ALL}
    for path in python_files(f"moeq/{room}"):
        assert rooms_of(path) <= allowed, f"{path}: {sorted(rooms_of(path) - allowed)}"
        assert not roots_of(path) & (LIGHTNING | {"callbacks", "datamodules", "main", "tests", "benchmarks"}), path


def test_the_page_on_architecture_draws_the_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf8")
    drawn = {room: set(below.split(", ")) for room, below in re.findall(r"^(\w+) +->  ([\w, ]+)$", page, re.MULTILINE)}
    for room, below in MAY_IMPORT.items():
        assert drawn.get(room, set()) == below, room


def test_the_table_has_no_circle() -> None:
    settled: set[str] = set()
    while ready := {room for room, below in MAY_IMPORT.items() if room not in settled and below <= settled}:
        settled |= ready
    assert settled == MAY_IMPORT.keys(), f"rooms in a circle: {sorted(MAY_IMPORT.keys() - settled)}"


def test_the_table_allows_nothing_that_no_file_does() -> None:
    for room, allowed in MAY_IMPORT.items():
        used = set().union(*(rooms_of(path) for path in python_files(f"moeq/{room}")))
        assert allowed <= used, f"{room} no longer imports {sorted(allowed - used)}: take it out of the table"


def test_what_all_rooms_may_import_imports_none() -> None:
    path = ROOT / f"moeq/{OPEN_TO_ALL}.py"
    assert not rooms_of(path)
    assert not roots_of(path) & (LIGHTNING | HEAVY)


def test_the_shell_imports_nothing_from_above() -> None:
    for name in SHELL:
        assert not roots_of(ROOT / f"moeq/{name}.py") & {"main", "tests", "benchmarks"}, name


def test_callbacks_never_import_each_other_and_datamodules_import_no_callback() -> None:
    for path in python_files("callbacks"):
        assert not roots_of(path) & {"main", "tests", "benchmarks", "callbacks", "datamodules"}, path
    for path in python_files("datamodules"):
        assert not roots_of(path) & {"main", "tests", "benchmarks", "callbacks"}, path


def test_packages_have_no_relative_imports_and_empty_inits() -> None:
    for folder in ("moeq", "callbacks", "datamodules"):
        for path in python_files(folder):
            assert not any(name.startswith(".") for name in imports_of(path)), path
            if path.name == "__init__.py":
                assert not imports_of(path), f"{path} imports something; import from the module that defines it"


def test_callbacks_and_datamodules_import_heavy_libraries_only_where_they_use_them() -> None:
    for folder in ("callbacks", "datamodules"):
        for path in python_files(folder):
            at_import = {alias.name.split(".")[0] for alias in _top_level_imports(path)}
            assert not at_import & HEAVY, f"{path}: import {at_import & HEAVY} inside the function that needs it"


def _top_level_imports(path: Path) -> list[ast.alias]:
    nodes = ast.parse(path.read_text(encoding="utf8")).body
    modules = [ast.alias(node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)]
    return modules + [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]


def test_rooms_without_models_import_no_transformers_not_even_through_a_neighbour() -> None:
    for room in WITHOUT_TRANSFORMERS:
        assert MAY_IMPORT[room] <= WITHOUT_TRANSFORMERS, room
        for path in python_files(f"moeq/{room}"):
            assert "transformers" not in roots_of(path), path
