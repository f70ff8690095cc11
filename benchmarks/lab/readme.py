"""The table of README.md: a part of ``results/quickstart.json``, between two markers.

python -m benchmarks.quickstart --all --json benchmarks/results/quickstart.json
python -m benchmarks.lab.readme
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.provenance import ROOT
from moeq.report.tables import markdown

BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
# Method and bits of the rows that are shown.
SHOWN = (
    ("original", 16), ("RTN", 3), ("GPTQ (prose)", 3), ("MoEQuant", 3), ("MoEQuant, allocated", 3),
    ("MoEQuant, all steps", 3), ("RTN", 4), ("MoEQuant", 4),
)  # fmt: skip
HEAD = ("method", "avg bits", "MB", "KL mean", "KL worst", "top-1 %", "seconds")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of the shown rows.

    Args:
        rows: Of ``results/quickstart.json``, fields as in ``moeq.report.results.ResultRow``.

    Raises:
        ValueError: A row that is shown is not there.
    """
    of = {(row["method"], row["bits"]): row for row in rows}
    if missing := [f"{method} at {bits} bits" for method, bits in SHOWN if (method, bits) not in of]:
        raise ValueError(f"no row for {', '.join(missing)} in quickstart.json; run the quickstart with --all")
    return markdown(HEAD, [_cells(of[key]) for key in SHOWN])


def _cells(row: dict[str, Any]) -> list[str]:
    label = row["method"] if row["bits"] == 16 else f"{row['method']} {row['bits']:g}"
    return [
        label, f"{row['average_bits']:.2f}", f"{row['bytes'] / 1e6:.1f}", f"{row['kl_mean']:.4f}",
        f"{row['kl_worst']:.4f}", f"{100 * row['top1_agreement']:.1f}", f"{row['seconds']:.0f}",
    ]  # fmt: skip


def shown(text: str, begin: str = BEGIN, end: str = END) -> str | None:
    """What stands between two markers of a page; None where they are not there."""
    if begin not in text or end not in text:
        return None
    return text.partition(begin)[2].partition(end)[0].strip() + "\n"


def rewritten(text: str, block: str) -> str:
    """The page with another table between the markers.

    Raises:
        ValueError: The page has no markers.
    """
    if shown(text) is None:
        raise ValueError(f"the page has no lines {BEGIN} and {END}; put them where the table goes")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.split(END, 1)[1]}"


def main(args: Sequence[str] | None = None) -> None:
    """Rewrite the table of README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/quickstart.json", help="rows")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="page with the markers")
    options = parser.parse_args(args)
    rows = json.loads(options.json.read_text(encoding="utf8"))["rows"]
    options.readme.write_text(rewritten(options.readme.read_text(encoding="utf8"), table(rows)), encoding="utf8")


if __name__ == "__main__":
    main()
