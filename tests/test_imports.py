"""Imports go one way, and ``--help`` does not wait for libraries it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMERICAL_CORE = ("quant", "calibration", "allocation", "tasks", "scoring", "generation", "programs", "export")
WITHOUT_TRANSFORMERS = ("quant", "allocation", "tasks", "scoring", "generation", "programs")
HEAVY = {"transformers", "datasets", "matplotlib"}
LIGHTNING = {"lightning", "pytorch_lightning"}
MAY_IMPORT_LIGHTNING = {
    "moeq/cli.py",
    "moeq/module.py",
    "moeq/progress.py",
    "moeq/strategy.py",
    "moeq/evaluation/start.py",
}


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


def python_files(folder: str) -> list[Path]:
    """Every Python file below ``folder``."""
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", [f"moeq/{name}" for name in NUMERICAL_CORE])
def test_the_numerical_core_imports_no_lightning_callback_or_datamodule(folder: str) -> None:
    for path in python_files(folder):
        assert not roots_of(path) & (LIGHTNING | {"callbacks", "datamodules", "main"}), path


@pytest.mark.parametrize("folder", [f"moeq/{name}" for name in WITHOUT_TRANSFORMERS])
def test_quantizers_allocators_and_tasks_import_no_transformers(folder: str) -> None:
    for path in python_files(folder):
        assert "transformers" not in roots_of(path), path


def test_only_the_lightning_files_of_the_library_import_lightning() -> None:
    for path in python_files("moeq"):
        if path.relative_to(ROOT).as_posix() not in MAY_IMPORT_LIGHTNING:
            assert not roots_of(path) & LIGHTNING, path


def test_the_library_imports_nothing_from_above() -> None:
    for path in python_files("moeq"):
        assert not roots_of(path) & {"callbacks", "datamodules", "main", "tests", "benchmarks"}, path


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


def test_help_imports_no_heavy_library() -> None:
    # Only the first page: `fit --help` needs Lightning, whose torchmetrics imports transformers and matplotlib.
    script = """
import runpy, sys
sys.argv = ["main.py", "--help"]
try:
    runpy.run_path("main.py", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"transformers", "datasets", "matplotlib", "torch"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "fit" in run.stdout
    assert "validate" in run.stdout
