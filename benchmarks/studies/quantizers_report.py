"""Tables of ``quantizers.py``: every method by grid, and moeq on its own data against other quantizers on an oracle's.

Rows of other quantizers come from ``peers.py``; they were given the mixture of all evaluated domains, which
nobody has for a real model.
"""

from collections.abc import Sequence
from math import exp
from statistics import fmean

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl

OURS = ("AGQ", "AGQ, router", "AGQ, damping 0.1, router", "AGQ, damping 0.1, router, learned")


def method_tables(rows: Sequence[Row]) -> str:
    """Markdown: for each grid one table, one row per method."""
    domains = list(rows[0]["domains"])
    parts = []
    for group_size, bits in dict.fromkeys((row["group_size"], row["bits"]) for row in rows):
        grid = f"groups of {group_size}" if group_size else "per channel"
        titles = ["method", "seeds", "mean KL", "worst KL", *(f"KL {name}" for name in domains)]
        titles += [*(f"ppl {name}" for name in domains), "router %", "s", "peak MB"]
        some = [row for row in rows if (row["group_size"], row["bits"]) == (group_size, bits)]
        lines = [_method_row(label, group, domains) for label, group in grouped(some, _label).items()]
        parts.append(f"## {bits} bits, {grid}\n\n{markdown(titles, lines)}")
    return "\n".join(parts)


def _method_row(label: str, group: Sequence[Row], domains: Sequence[str]) -> list[str]:
    cells = [label, str(len(group)), cell([1e3 * mean_kl(row) for row in group])]
    cells += [cell([1e3 * worst_kl(row) for row in group])]
    cells += [f"{fmean(1e3 * row['domains'][name]['kl'] for row in group):.2f}" for name in domains]
    cells += [f"{fmean(exp(row['domains'][name]['nll']) for row in group):.2f}" for name in domains]
    cells += [f"{100 * fmean(map(router_agreement, group)):.1f}", f"{fmean(row['seconds'] for row in group):.0f}"]
    return [*cells, f"{fmean(row['peak_mb'] for row in group):.0f}"]


def against_peers(rows: Sequence[Row], peers: Sequence[Row]) -> str:
    """Markdown: moeq on its own data, and each other quantizer on each set of data; thousandths of a nat."""
    ours = [
        {**row, "quantizer": f"moeq ({row['arm']})", "data": "corpus"}
        for row in rows
        if row["arm"] in OURS and not row["rotation"]
    ]
    theirs = [{**row, "quantizer": row["peer"], "group_size": row["group"] or None} for row in peers]
    grids = dict.fromkeys((row["group_size"], row["bits"]) for row in sorted(theirs, key=lambda r: r["bits"]))
    lines = []
    for group_size, bits in grids:
        some = [row for row in [*ours, *theirs] if (row["group_size"], row["bits"]) == (group_size, bits)]
        for key, group in grouped(some, lambda row: (row["quantizer"], row["data"], row["tokens"])).items():
            cells = [cell([1e3 * statistic(row) for row in group]) for statistic in (mean_kl, worst_kl)]
            lines.append([bits, f"g{group_size}" if group_size else "channel", *key, len(group), *cells])
    head = ["bits", "grid", "quantizer", "data", "tokens", "seeds", "mean KL", "worst KL"]
    return f"## Against other quantizers\n\n{markdown(head, lines)}"


def _label(row: Row) -> str:
    return f"{row['arm']}, rotated" if row["rotation"] else str(row["arm"])
