"""Tables of ``quantizers.py``: every method by grid, and moeq on its own data against other quantizers on an oracle's.

Rows of other quantizers come from ``peers/measure.py``; they were given the mixture of all evaluated domains, which
nobody has for a real model.
"""

import json
from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import fmean

from ebss_effect_report import Row, cell, mean_kl, router_agreement, worst_kl

OURS = ("AGQ", "AGQ, router", "AGQ, damping 0.1, router", "AGQ, damping 0.1, router, learned")


def write_report(rows: Sequence[Row], peers: Sequence[Row], source: str, path: Path | None) -> None:
    """Print the tables; with a path, write the rows as JSON and the tables as Markdown beside it."""
    tables = f"{against_peers(rows, peers)}\n{method_tables(rows)}"
    print(f"\n{tables}")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"origin": source, "rows": list(rows)}, indent=1) + "\n")
    tokens = max(row["tokens"] for row in rows)
    path.with_suffix(".md").write_text(
        f"# What each quantizer is worth\n\n{source}. Bundled model; KL to the original in thousandths of a nat per "
        "token, mean and standard deviation over seeds; 32 windows of 256 tokens of each domain. Calibration: "
        f"{tokens} tokens that the model wrote itself. Seconds are of one core, peak memory is what a fit adds to the "
        f"process.\n\n{tables}"
    )


def method_tables(rows: Sequence[Row]) -> str:
    """Markdown: for each grid one table, one row per method."""
    domains = list(rows[0]["domains"])
    parts = []
    for group_size, bits in dict.fromkeys((row["group_size"], row["bits"]) for row in rows):
        grid = f"groups of {group_size}" if group_size else "per channel"
        lines = [f"## {bits} bits, {grid}", ""]
        titles = ["method", "seeds", "mean KL", "worst KL", *(f"KL {name}" for name in domains)]
        titles += [*(f"ppl {name}" for name in domains), "router %", "s", "peak MB"]
        lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        some = [row for row in rows if (row["group_size"], row["bits"]) == (group_size, bits)]
        for label in dict.fromkeys(map(_label, some)):
            lines.append(_method_row(label, [row for row in some if _label(row) == label], domains))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _method_row(label: str, group: Sequence[Row], domains: Sequence[str]) -> str:
    cells = [label, str(len(group)), cell([1e3 * mean_kl(row) for row in group])]
    cells += [cell([1e3 * worst_kl(row) for row in group])]
    cells += [f"{fmean(1e3 * row['domains'][name]['kl'] for row in group):.2f}" for name in domains]
    cells += [f"{fmean(exp(row['domains'][name]['nll']) for row in group):.2f}" for name in domains]
    cells += [f"{100 * fmean(map(router_agreement, group)):.1f}", f"{fmean(row['seconds'] for row in group):.0f}"]
    cells.append(f"{fmean(row['peak_mb'] for row in group):.0f}")
    return "| " + " | ".join(cells) + " |"


def against_peers(rows: Sequence[Row], peers: Sequence[Row]) -> str:
    """Markdown: moeq on its own data, and each other quantizer on each set of data; thousandths of a nat."""
    lines = ["| bits | grid | quantizer | data | tokens | seeds | mean KL | worst KL |", "|---" * 8 + "|"]
    ours = [
        {**row, "quantizer": f"moeq ({row['arm']})", "data": "corpus"}
        for row in rows
        if row["arm"] in OURS and not row["rotation"]
    ]
    theirs = [{**row, "quantizer": row["peer"], "group_size": row["group"] or None} for row in peers]
    grids = dict.fromkeys((row["group_size"], row["bits"]) for row in sorted(theirs, key=lambda r: r["bits"]))
    for group_size, bits in grids:
        some = [row for row in [*ours, *theirs] if (row["group_size"], row["bits"]) == (group_size, bits)]
        for key in dict.fromkeys((row["quantizer"], row["data"], row["tokens"]) for row in some):
            group = [row for row in some if (row["quantizer"], row["data"], row["tokens"]) == key]
            cells = [cell([1e3 * statistic(row) for row in group]) for statistic in (mean_kl, worst_kl)]
            cells = [str(bits), f"g{group_size}" if group_size else "channel", *map(str, key), str(len(group)), *cells]
            lines.append(f"| {' | '.join(cells)} |")
    return "## Against other quantizers\n\n" + "\n".join(lines) + "\n"


def _label(row: Row) -> str:
    return f"{row['arm']}, rotated" if row["rotation"] else str(row["arm"])
