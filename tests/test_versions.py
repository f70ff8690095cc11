"""One place says which version is used: constraints.txt the tested one, pyproject.toml the oldest."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(name: str) -> dict[str, str]:
    lines = (line.partition("==") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return {package: version for package, _, version in lines}


def minimum(requirement: str) -> tuple[str, str]:
    """Package and lowest version of a requirement such as ``jsonargparse[signatures]>=4.47,<5``."""
    found = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:>=|==)([\d.]+)(?:,<\d+)?(?:; .+)?", requirement)
    assert found, requirement
    return found[1], found[2]


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_the_oldest_version_of_each_dependency_is_the_one_that_is_tested(requirement: str) -> None:
    package, version = minimum(requirement)
    tested = pinned("constraints-minimum.txt")[package].split(".")
    wanted = version.split(".")
    assert tested[: len(wanted)] == wanted
    assert not any(map(int, tested[len(wanted) :]))


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_direct_dependency_is_pinned_at_or_above_its_minimum(requirement: str) -> None:
    package, version = minimum(requirement)
    used = pinned("constraints.txt")[package]
    assert [int(part) for part in used.split(".")] >= [int(part) for part in version.split(".")]


def test_pre_commit_runs_the_ruff_of_constraints_and_the_mypy_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    ruff, files, local = config["repos"]
    assert ruff["rev"] == f"v{pinned('constraints.txt')['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]
    assert "mypy" in pinned("constraints.txt")
    limit = next(hook for hook in files["hooks"] if hook["id"] == "check-added-large-files")
    (size,) = (int(each.removeprefix("--maxkb=")) for each in limit["args"] if each.startswith("--maxkb="))
    tracked = [
        path for folder in ("assets", "benchmarks", "docs", "tests", "moeq") for path in (ROOT / folder).rglob("*")
    ]
    large = [path for path in tracked if path.is_file() and path.stat().st_size > size * 1024]
    allowed = [path for path in large if re.search(limit["exclude"], path.relative_to(ROOT).as_posix())]
    assert large == allowed
    assert large
