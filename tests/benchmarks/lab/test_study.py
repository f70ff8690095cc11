"""A study measures each case once, goes on where it was stopped, and says where every row came from."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.lab.study import Study, case_name
from benchmarks.lab.tables import Row, cell, grouped, markdown


@dataclass(frozen=True)
class Case:
    seed: int
    size: int


class Toy(Study[Case]):
    title = "A toy"
    legend = "Sizes."
    quick: ClassVar = {"seeds": [0], "sizes": [1]}
    threads = None
    measured: ClassVar[list[Case]] = []

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cases(self) -> list[Case]:
        return [Case(seed, size) for size in self.options.sizes for seed in self.options.seeds]

    def measure(self, case: Case) -> Row | None:
        self.measured.append(case)
        return None if case.size == 9 else {"value": 10 * case.size + case.seed}

    def report(self, rows: Sequence[Row]) -> str:
        groups = grouped(rows, lambda row: row["size"])
        return markdown(["size", "value"], [[key, cell([r["value"] for r in g], ".1f")] for key, g in groups.items()])


class Timed(Toy):
    keeps = False


@pytest.fixture(autouse=True)
def _none_measured() -> None:
    Toy.measured.clear()


def run(kind: type[Toy], folder: Path, *args: str) -> Path:
    given = ["--folder", str(folder)] if kind.keeps else []
    kind.main([*given, "--json", str(folder / "out.json"), *args])
    return folder / "out.json"


def test_a_study_goes_on_after_its_finished_cases(tmp_path: Path) -> None:
    run(Toy, tmp_path, "--sizes", "1")
    assert Toy.measured == [Case(seed, 1) for seed in range(3)]
    (tmp_path / f"{case_name(Case(1, 1))}.json").unlink()
    path = run(Toy, tmp_path, "--sizes", "1", "2")
    assert Toy.measured[3:] == [Case(1, 1), *(Case(seed, 2) for seed in range(3))]
    rows = json.loads(path.read_text())["rows"]
    assert rows == [{"seed": s, "size": n, "value": 10 * n + s} for n in (1, 2) for s in range(3)]
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# A toy\n\n`")
    assert "| 1 | 11.0 +- 1.0 |\n| 2 | 21.0 +- 1.0 |" in text


def test_shares_divide_the_seeds_and_a_report_runs_nothing(tmp_path: Path) -> None:
    run(Toy, tmp_path, "--share", "1/2")
    assert {case.seed for case in Toy.measured} == {1}
    run(Toy, tmp_path, "--share", "0/2")
    assert sorted((case.seed, case.size) for case in Toy.measured) == [(s, n) for s in range(3) for n in (1, 2)]
    before = len(Toy.measured)
    path = run(Toy, tmp_path, "--report", "--seeds", "2", "--sizes", "1")
    assert len(Toy.measured) == before
    assert len(json.loads(path.read_text())["rows"]) == 6


def test_every_row_keeps_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        monkeypatch.setattr("benchmarks.lab.study.provenance", lambda device, n=number: f"commit{n} on {device}")
        path = run(Toy, tmp_path, "--sizes", *"12"[:number], "--seeds", "0", "1")
    assert json.loads(path.read_text())["origin"].endswith("; rows: 2 at commit1 on cpu; 2 at commit2 on cpu")


def test_a_quick_look_is_not_taken_for_the_study(tmp_path: Path) -> None:
    run(Toy, tmp_path, "--quick")
    assert Toy.measured == [Case(0, 1)]
    run(Toy, tmp_path, "--sizes", "1", "--seeds", "0")
    assert Toy.measured == [Case(0, 1)] * 2
    run(Toy, tmp_path, "--quick", "--sizes", "2")
    assert Toy.measured[2:] == [Case(0, 2)]


def test_a_case_without_an_answer_is_not_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Toy, tmp_path, "--sizes", "9")
    run(Toy, tmp_path, "--sizes", "9")
    assert len(Toy.measured) == 3
    assert "no case has been measured" in capsys.readouterr().out


def test_times_are_measured_anew(tmp_path: Path) -> None:
    for _ in range(2):
        path = run(Timed, tmp_path, "--sizes", "1")
    assert len(Toy.measured) == 6
    assert len(json.loads(path.read_text())["rows"]) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"out.json", "out.md"}


def test_cases_have_names_of_their_own() -> None:
    @dataclass(frozen=True)
    class Named:
        arm: str
        bits: int | None

    names = {case_name(Named(arm, bits)) for arm in ("kappa 0", "kappa 0, damping 0.1") for bits in (None, 3)}
    assert len(names) == 4
    assert all("/" not in name and " " not in name for name in names)
