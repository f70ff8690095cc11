"""A study: cases that are measured once each, kept as they come, and reported as JSON, Markdown and perhaps a figure.

A study is a class with a question (``title``), cases and their measurement; this one has the rest: the command line,
what ``--quick`` narrows, the share of one of several processes, a file per case so that a stopped study goes on, and
the report with the provenance of every row.

    class Reach(Study[Case]):
        title, quick = "Which domains a calibration set reaches", {"seeds": [0]}
        def cases(self): ...
        def measure(self, case): ...
        def report(self, rows): ...
"""

import argparse
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from benchmarks.lab.provenance import command, provenance
from benchmarks.lab.tables import Row, grouped
from benchmarks.lab.yardstick import Yardstick
from moeq.disk.atomic import write_json

MODEL = "assets/reference-moe"
CaseT = TypeVar("CaseT")


@dataclass(frozen=True)
class Kept:
    """A measured row, and where it comes from (its ``Provenance`` in words)."""

    origin: str
    row: Row | None


class Study(ABC, Generic[CaseT]):
    """A question and the cases that answer it; a case is a frozen dataclass with a ``seed``.

    Attributes:
        title: Heading of the report.
        legend: What its columns mean, after the provenance.
        seeds: Default of ``--seeds``.
        quick: Values that ``--quick`` gives to options.
        keeps: Whether cases are kept in ``--folder``; not where time is measured, which a kept row would not show.
        threads: Of torch; None leaves them.
    """

    title: ClassVar[str]
    legend: ClassVar[str] = ""
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    quick: ClassVar[Mapping[str, Any]] = {}
    keeps: ClassVar[bool] = True
    threads: ClassVar[int | None] = 1

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this study alone."""

    @abstractmethod
    def cases(self) -> list[CaseT]:
        """All cases that the options ask for, in the order in which they are run."""

    @abstractmethod
    def measure(self, case: CaseT) -> Row | None:
        """What is found, without the fields of the case; None where a case has no answer."""

    @abstractmethod
    def report(self, rows: Sequence[Row]) -> str:
        """Markdown of the rows: the fields of their cases and what was measured."""

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Write a figure, where a study has one."""

    @cached_property
    def yardstick(self) -> Yardstick:
        """The bundled model with its evaluation texts, opened when it is first needed."""
        return Yardstick(MODEL)

    @property
    def device(self) -> torch.device:
        """On which the measured model is."""
        return torch.device(self.yardstick.model.device)

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        """The command line."""
        module = sys.modules[cls.__module__]
        parser = argparse.ArgumentParser(
            description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        stem = Path(str(module.__file__)).stem
        narrowed = ", ".join(f"{name} {value}" for name, value in cls.quick.items())
        parser.add_argument("--seeds", type=int, nargs="+", default=list(cls.seeds))
        parser.add_argument("--quick", action="store_true", help=f"a look: {narrowed}")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here, and .md (.png) beside it")
        if cls.keeps:
            folder = Path("runs") / stem
            parser.add_argument("--folder", type=Path, default=folder, help=f"rows of single cases (default {folder})")
            parser.add_argument("--share", default="0/1", help="of one process: 0/2 and 1/2 divide the seeds")
            parser.add_argument("--report", action="store_true", help="run nothing; report every row of the folder")
        cls.add_arguments(parser)
        return parser

    @classmethod
    def main(cls, args: Sequence[str] | None = None) -> None:
        """Measure what is missing of this share; print the report and write it where one is asked for."""
        parser = cls.parser()
        options = parser.parse_args(args)
        if options.quick:
            # As defaults: what the command line says all the same is done.
            parser.set_defaults(**cls.quick)
            options = parser.parse_args(args)
            if cls.keeps:
                options.folder = options.folder / "quick"
        if cls.threads is not None:
            torch.set_num_threads(cls.threads)
        study = cls(options)
        kept = study.kept_rows() if cls.keeps else study.run(options.json, args)
        if rows := [one.row for one in kept if one.row is not None]:
            print(f"\n{study.report(rows)}")
            study.write(kept, command(cls.__module__, args), options.json)
        else:
            print("no case has been measured; leave out --report, or give the --folder of its rows")

    def run(self, path: Path | None, args: Sequence[str] | None) -> list[Kept]:
        """Measure every case; what is finished is written after each, so that a run that is cut short leaves it."""
        kept: list[Kept] = []
        for case in self.cases():
            kept.append(self._measured(case))
            print(json.dumps(kept[-1].row), flush=True)
            if path is not None:
                self.write(kept, command(type(self).__module__, args), path)
        return kept

    def kept_rows(self) -> list[Kept]:
        """Measure the missing cases of this share, unless a report is all that is wanted; then read what is there."""
        part, num_parts = map(int, self.options.share.split("/"))
        self.options.folder.mkdir(parents=True, exist_ok=True)
        cases = self.cases()
        paths = [self.options.folder / f"{case_name(case)}.json" for case in cases]
        for case, path in zip(cases, paths, strict=True):
            # By seeds, so that no two processes write the same sampled set.
            if not self.options.report and case.seed % num_parts == part and not path.is_file():  # type: ignore[attr-defined]
                start = time.perf_counter()
                write_json(path, asdict(self._measured(case)))
                print(f"{path.stem} in {time.perf_counter() - start:.0f} s", flush=True)
        if self.options.report:  # those of other options, too
            paths += sorted(set(self.options.folder.glob("*seed_*.json")) - set(paths))
        return [Kept(**json.loads(path.read_text())) for path in paths if path.is_file()]

    def _measured(self, case: CaseT) -> Kept:
        found = self.measure(case)
        assert is_dataclass(case)
        assert not isinstance(case, type)
        return Kept(str(provenance(self.device)), None if found is None else {**asdict(case), **found})

    def write(self, kept: Sequence[Kept], source: str, path: Path | None) -> None:
        """With a path, write rows as JSON, and beside it the report as Markdown and the figure."""
        if path is None:
            return
        rows = [one.row for one in kept if one.row is not None]
        origins = grouped([{"origin": one.origin} for one in kept if one.row is not None], lambda row: row["origin"])
        origin = f"`{source}`; rows: " + "; ".join(f"{len(found)} at {name}" for name, found in origins.items())
        write_json(path, {"origin": origin, "rows": rows})
        self.draw(rows, path.with_suffix(".png"))
        path.with_suffix(".md").write_text(self.markdown(origin, rows, path.with_suffix(".png")), encoding="utf8")

    def markdown(self, origin: str, rows: Sequence[Row], figure: Path) -> str:
        """The whole report, with the figure where there is one."""
        image = f"![figure]({figure.name})\n\n" if figure.is_file() else ""
        return f"# {self.title}\n\n{origin}. {self.legend}\n\n{image}{self.report(rows)}"


def case_name(case: object) -> str:
    """Name of the file of a case: its fields with their values, in letters that every file system takes."""
    fields = "-".join(f"{name}_{value}" for name, value in asdict(case).items())  # type: ignore[call-overload]
    return re.sub(r"[^\w.-]+", "_", fields)
