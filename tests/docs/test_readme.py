"""README is short, shows the rooms as they are, and repeats its own numbers and those of the studies correctly."""

import ast
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from docs.readme_figure import BITS, PICTURE, bars, figure
from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")
# Rows of the quickstart's table, and the configurations that they are made with.
RECIPES = {
    "RTN 3": "rtn_w3",
    "MoEQuant 3": "moequant_w3",
    "MoEQuant 4": "moequant_w4",
    "MoEQuant, allocated 3": "moequant_allocated_w3",
    "MoEQuant, all steps 3": "moequant_best_w3",
}


def quickstart() -> dict[str, str]:
    """KL of the quickstart's table by method, and width where that has a column of its own."""
    (table,) = re.findall(r"<!-- quickstart:begin -->\n(.*?)<!-- quickstart:end -->", README, re.DOTALL)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    named = [dict(zip(head, row, strict=True)) for row in rows]
    return {f"{row['method']} {row.get('bits', '')}".strip(): row["KL mean"] for row in named}


def test_readme_is_a_page_or_two_without_a_file_tree() -> None:
    assert len(README) <= 8000
    blocks = re.findall(r"^```\w*\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    assert max(block.count("\n") for block in blocks) <= 24


def test_the_rooms_are_shown_with_the_first_lines_of_their_packages() -> None:
    (block,) = re.findall(r"^## The rooms\n\n```\n(.*?)```", README, re.DOTALL | re.MULTILINE)
    packages = [
        ROOT / "callbacks",
        ROOT / "datamodules",
        *sorted(path.parent for path in ROOT.glob("moeq/*/__init__.py")),
    ]
    shown = [line.split(maxsplit=1) for line in block.splitlines() if not line.startswith("moeq/")]
    assert [(name, line) for name, line in shown] == [
        (f"{package.name}/", _first_line(package)) for package in packages
    ]


def _first_line(package: Path) -> str:
    documentation = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf8")))
    assert documentation is not None, f"{package.name}/__init__.py has no docstring"
    return documentation.splitlines()[0].rstrip(".")


def test_the_table_of_configurations_repeats_the_quickstart() -> None:
    cells = dict(re.findall(r"^\| `(\w+)\.yaml` \|.*?\| \d \| ([\d.]+) \|", README, re.MULTILINE))
    assert len(cells) == 6
    shown = quickstart()
    assert {config: shown[label] for label, config in RECIPES.items()} == {c: cells[c] for c in RECIPES.values()}
    assert cells["moequant_learned_w3"] == f"{bars(3)[-1].mean:.4f}"


def test_the_comparison_with_peers_is_that_of_the_study_over_three_seeds() -> None:
    rows = json.loads((ROOT / "benchmarks/results/peers.json").read_text(encoding="utf8"))["rows"]
    for peer in ("moeq", "llmcompressor_routed", "gptqmodel"):
        same = [r for r in rows if (r["peer"], r["bits"], r["group"], r["data"]) == (peer, 3, 64, "mixture")]
        found = [mean(domain["kl"] for domain in row["domains"].values()) for row in same]
        assert len(found) == len({row["seed"] for row in same}) == 3
        assert f"{mean(found):.4f} +- {stdev(found):.4f}" in " ".join(README.split()), peer


@pytest.mark.parametrize("bits", BITS)
def test_the_picture_shows_what_the_study_reports(bits: int) -> None:
    """The table of the study is made by other code, from the same rows."""
    table = (ROOT / "benchmarks/results/quantizers.md").read_text(encoding="utf8")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {bits} | g64 |")]
    reported = {(row[2], row[3]): (int(row[5]), float(row[6].split(" ")[0])) for row in rows if row[4] == "16384"}
    peers = [value for (name, _), value in reported.items() if not name.startswith("moeq")]
    rtn, peer, ours, learned = bars(bits)
    assert _as_reported(peer.kl) == min(peers, key=lambda value: value[1])
    assert _as_reported(ours.kl) == reported["moeq (AGQ, damping 0.1, router)", "corpus"]
    assert _as_reported(learned.kl) == reported["moeq (AGQ, damping 0.1, router, learned)", "corpus"]
    assert f"| RTN | 1 | {_as_reported(rtn.kl)[1]:.2f} " in table
    assert all(f"{bar.mean:.4f}" in bar.text() for bar in (rtn, peer, ours, learned))


def _as_reported(kl: tuple[float, ...]) -> tuple[int, float]:
    """Number of seeds, and the mean in thousandths of a nat."""
    return len(kl), float(f"{1e3 * sum(kl) / len(kl):.2f}")


def test_the_picture_can_be_drawn_and_is_there() -> None:
    assert len(figure().axes) == len(BITS)
    assert 0 < PICTURE.stat().st_size < 100_000


def test_the_comparison_with_llama_cpp_is_that_of_the_study() -> None:
    shown = re.findall(r"^\| ([\d.]+) \| (Q\w+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    table = (ROOT / "benchmarks/results/gguf.md").read_text(encoding="utf8").partition("## At equal size")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    found = {row[0]: row for row in rows}
    assert len(shown) == 4
    for bits, name, theirs, ours in shown:
        row = found[name]
        assert [bits, theirs, ours] == [row[1], row[2].split()[0], row[7].split()[0]]
        assert all("+-" in row[cell] for cell in (2, 7)), "one seed is not a comparison"
