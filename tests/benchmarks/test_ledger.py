"""Every figure of the ledger stands in its result, every result in the ledger, and README shows what was measured."""

import importlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lab.readme import shown, table
from benchmarks.lab.study import Study
from moeq.report.results import ResultRow, markdown_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
LEDGER = (ROOT / "benchmarks/README.md").read_text(encoding="utf8")
HEAD = ("claim", "number", "study", "result", "minutes", "seeds", "commit")
FIGURE = re.compile(r"\[(?P<labels>[^\]]+)\] (?P<value>[^;]+)")


@dataclass(frozen=True)
class Entry:
    """A row of the ledger, cells as in ``HEAD``."""

    claim: str
    number: str
    study: str
    result: str
    minutes: str
    seeds: str
    commit: str

    @property
    def module(self) -> str:
        found = re.fullmatch(r"`python -m (benchmarks\.[\w.]+)`", self.study)
        assert found, self.study
        return found[1]

    @property
    def file(self) -> Path:
        found = re.fullmatch(r"\[(\S+)\]\(results/(\S+)\)", self.result)
        assert found, self.result
        assert found[1] == found[2]
        return RESULTS / found[1]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_ledger(text: str) -> list[Entry]:
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| claim |"))
    assert tuple(cells(lines[start])) == HEAD
    return [Entry(*cells(line)) for line in lines[start + 2 :] if line.startswith("|")]


ENTRIES = read_ledger(LEDGER)
MODULES = sorted({entry.module for entry in ENTRIES})


def lines_of(path: Path) -> list[list[str]]:
    """Cells of every line of a result; those of a Markdown table come with the heading above them."""
    text = path.read_text(encoding="utf8")
    if path.suffix == ".json":
        return [[part.strip(' ",') for part in line.split(":")] for line in text.splitlines()]
    heading, found = "", []
    for line in text.splitlines():
        heading = line.lstrip("# ") if line.startswith("#") else heading
        if line.startswith("|"):
            found.append([heading, *cells(line)])
    return found


def is_found(lines: list[list[str]], labels: list[str], value: str) -> bool:
    """Whether a line has the labels and, in another cell, the value."""
    for line in lines:
        rest = list(line)
        if all(label in rest and not rest.remove(label) for label in labels) and value in rest:
            return True
    return False


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.claim[:40])
def test_every_figure_stands_in_its_result_in_the_row_that_the_ledger_names(entry: Entry) -> None:
    figures = FIGURE.findall(entry.number)
    assert figures
    assert "; ".join(f"[{labels}] {value}" for labels, value in figures) == entry.number
    lines = lines_of(entry.file)
    for labels, value in figures:
        assert is_found(lines, labels.split(" / "), value.strip()), f"{entry.file.name} has no {value} for {labels}"


def test_a_figure_of_another_row_is_not_found() -> None:
    lines = [["3 bits", "AGQ", "1.00", "2.00"], ["3 bits", "GPTQ", "3.00", "AGQ"]]
    assert is_found(lines, ["3 bits", "AGQ"], "1.00")
    assert not is_found(lines, ["AGQ"], "4.00")
    assert not is_found(lines, ["3 bits", "GPTQ"], "1.00")
    assert not is_found(lines, ["1.00"], "1.00")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.claim[:40])
def test_fewer_than_three_seeds_are_said_to_be_fewer(entry: Entry) -> None:
    counts = [int(number) for number in re.findall(r"\d+", re.sub(r"\d+ bits|length \d+|of \d+: \d+", "", entry.seeds))]
    assert counts or entry.seeds == "deterministic"
    assert ("fewer than three" in entry.seeds) == (min(counts, default=3) < 3)


def test_seeds_are_those_of_the_rows() -> None:
    # Where a table has a column of seeds, the ledger cannot claim more.
    for entry in ENTRIES:
        lines = entry.file.read_text(encoding="utf8").splitlines()
        if entry.file.name != "quantizers.md" or "g64 /" not in entry.number:
            continue
        column = cells(next(line for line in lines if line.startswith("| bits | grid |"))).index("seeds")
        for labels, value in FIGURE.findall(entry.number):
            wanted = {*labels.split(" / "), value.strip()}
            seeds = {cells(line)[column] for line in lines if wanted <= set(cells(line))}
            assert len(seeds) == 1
            assert seeds <= set(re.findall(r"\d+", entry.seeds)), (entry.claim, labels, seeds)


@pytest.mark.parametrize("module", MODULES)
def test_every_study_explains_itself(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = importlib.import_module(module)
    classes = [
        value for value in vars(loaded).values()
        if isinstance(value, type) and issubclass(value, Study) and value.__module__ == module
    ]  # fmt: skip
    main = classes[0].main if classes else loaded.main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert bool(classes) == ("--seeds" in text)
    assert "--quick" in text or module.endswith("quickstart")
    assert f"python -m {module}" in text


def test_every_study_of_the_folder_is_in_the_ledger_or_has_no_result_yet() -> None:
    for path in sorted((ROOT / "benchmarks").glob("s*/*.py")):
        module = f"benchmarks.{path.parent.name}.{path.stem}"
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf8") and path.stem != "solve_peers":
            assert (module in MODULES) == any(RESULTS.glob(f"{path.stem}*.*")), module


def test_every_result_is_in_the_ledger() -> None:
    stems = {entry.file.stem for entry in ENTRIES}
    assert [path.name for path in sorted(RESULTS.iterdir()) if path.stem not in stems] == []


def test_commits_exist() -> None:
    def git(*args: str, given: str = "") -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], input=given, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        whole = git("rev-parse", "--is-shallow-repository") == "false"
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or not a checkout")
    if not whole:
        pytest.skip("a shallow clone has no old commits")
    commits = sorted({entry.commit for entry in ENTRIES})
    answers = git("cat-file", "--batch-check", given="\n".join(commits)).splitlines()
    assert [answer for answer in answers if answer.split()[1:2] != ["commit"]] == []


def test_readme_shows_what_the_quickstart_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    rows = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf8"))["rows"]
    part, whole = shown(readme), shown(readme, "<!-- results:begin -->", "<!-- results:end -->")
    assert part is not None or whole is not None, "README.md has no markers around its table"
    assert part in (None, table(rows))
    every = markdown_table([ResultRow(**row) for row in rows])
    assert whole in (None, every)
    assert every in (RESULTS / "quickstart.md").read_text(encoding="utf8")
