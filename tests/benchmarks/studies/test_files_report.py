"""Tables of the studies of files."""

from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.studies.files_report import MIN_GAP, best, draw, files, readable_ticks, report


def row(quantizer: str, kind: str, num_bytes: int, kl: float, seed: int = 0) -> dict[str, Any]:
    domains = {
        name: {"kl": factor * kl, "nll": 0.0, "top1_agreement": 0.5} for name, factor in (("a", 0.5), ("b", 1.5))
    }
    return {"quantizer": quantizer, "kind": kind, "seed": seed, "bytes": num_bytes, "bits": 4.0, "domains": domains}


ROWS = [
    row("moeq", "4.5", 1001, 0.5, 0), row("moeq", "4.5", 1001, 0.7, 1), row("moeq", "5", 1100, 0.1),
    row("rival", "Q4", 1000, 1.0), row("other", "four", 900, 0.75), row("rival", "Q2", 500, 2.0),
]  # fmt: skip


def test_a_larger_file_is_no_match_but_for_its_name() -> None:
    ours = [one for one in files(ROWS) if one.quantizer == "moeq"]
    found = best(ours, 1000)
    assert found is not None
    assert (found.kind, round(found.kl, 9)) == ("4.5", 0.6)
    assert best(ours, 998) is None
    larger = best(ours, 1100)
    assert larger is not None
    assert larger.kind == "5"


def test_both_goals_decide_and_sizes_without_a_file_of_ours_are_left_out() -> None:
    text = report(ROWS, ("moeq",), "rival")
    comparison = [line for line in text.split("## Every file")[0].splitlines() if line.startswith("| Q")]
    # 40% below the rival, and only 20% below the best other.
    assert len(comparison) == 1
    assert comparison[0].startswith("| Q4 | 4.00 | 1.0000 | other four | 0.7500 | moeq 4.5 | 4.00 | 0.6000 +- 0.1414 |")
    assert comparison[0].endswith("| 40% | 20% | no |")
    nearer = report([*ROWS[:4], row("other", "four", 900, 0.9), ROWS[5]], ("moeq",), "rival")
    assert "| 40% | 33% | yes |" in nearer


def test_every_file_has_one_row_of_its_seeds_in_the_order_of_sizes() -> None:
    lines = report(ROWS, ("moeq",), "rival").split("## Every file\n\n")[1].splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["Q2", "four", "Q4", "4.5", "5"]
    assert lines[3] == "| moeq | 4.5 | 4.000 | 1001 | 2 | 0.6000 +- 0.1414 | 0.9000 | 1.000 | 1.000 | 50.0 |"


@pytest.mark.parametrize(("low", "high"), [(2.4, 8.5), (4.1, 4.6), (3.0, 3.0)])
def test_labels_of_an_axis_do_not_touch_and_lie_on_it(low: float, high: float) -> None:
    ticks = readable_ticks(low, high)
    assert ticks
    assert all(0.95 * low <= bits <= 1.05 * high for bits in ticks)
    gaps = [log(b / a) for a, b in pairwise(ticks)]
    assert all(gap >= MIN_GAP * log(high / low) for gap in gaps)


def test_a_figure_is_of_what_is_quantized(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "without.png")
    draw([*ROWS, {**row("unquantized", "BF16", 4000, 1e-5), "bits": 16.0}], tmp_path / "with.png")
    without, with_it = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("without", "with"))
    assert (without == with_it).all()
