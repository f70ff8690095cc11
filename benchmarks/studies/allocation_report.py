"""Tables, figure and verdicts of ``allocation.py``; means and standard deviations over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl

# Finding of the paper: what should be better, and than what.
FINDINGS = (
    ("attention before experts", "attention", "random linears"),
    ("shared before routed experts", "shared", "random linears"),
    ("most used before random experts", "most used experts (affinity)", "random experts"),
    ("first before last blocks", "first blocks", "last blocks"),
    ("outlier scorer before random linears", "outlier score", "random linears"),
    ("predictor before random blocks", "least similar blocks (predicted)", "random blocks"),
    ("predictor before measured similarity", "least similar blocks (predicted)", "least similar blocks (measured)"),
    ("combination before random linears", "combination of the paper", "random linears"),
    ("combination before uniform bits", "combination of the paper", "uniform"),
)


def table(rows: Sequence[Row], budget: float) -> str:
    """Markdown: one row per way to give bits, the best first."""
    groups = _groups(rows, budget)
    domains = list(rows[0]["domains"])
    head = ["row", "bits", "with scales", "kB", *(f"KL {d}" for d in domains), "KL mean", "KL worst"]
    head += [*(f"ppl {d}" for d in domains), "exact %"]
    lines = []
    for row, group in sorted(groups.items(), key=lambda item: fmean(map(mean_kl, item[1]))):
        cells = [f"{fmean(e['code_bits'] for e in group):.3f}", f"{fmean(e['average_bits'] for e in group):.3f}"]
        cells.append(f"{fmean(e['bytes'] for e in group) / 1e3:.0f}")
        cells += [cell([e["domains"][d]["kl"] for e in group], ".4f") for d in domains]
        cells += [cell([statistic(e) for e in group], ".4f") for statistic in (mean_kl, worst_kl)]
        cells += [cell([math.exp(e["domains"][d]["nll"]) for e in group]) for d in domains]
        lines.append([row, *cells, cell([100 * e["exact_match"] for e in group], ".1f")])
    return markdown(head, lines)


def findings(rows: Sequence[Row]) -> str:
    """Markdown: ratio of mean KL of the two sides of each finding, paired by seed; below 1 it holds."""
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for name, better, worse in FINDINGS:
        cells = []
        for budget in budgets:
            groups = _groups(rows, budget)
            other = {row["seed"]: row for row in groups.get(worse, [])}
            pairs = [(e, other[e["seed"]]) for e in groups.get(better, []) if e["seed"] in other]
            cells.append(cell([mean_kl(a) / mean_kl(b) for a, b in pairs]) if pairs else "")
        lines.append([name, *cells])
    text = markdown(["finding", *(f"{budget} bits" for budget in budgets)], lines)
    return f"KL of the left side over KL of the right side; below 1 the finding holds.\n\n{text}"


def draw(rows: Sequence[Row], label: str, path: Path) -> None:
    """Mean KL of every row, one panel per budget, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    budgets = sorted({row["budget"] for row in rows})
    figure = Figure(figsize=(5.2 * len(budgets), 7.5), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        groups = sorted(_groups(rows, budget).items(), key=lambda item: -fmean(map(mean_kl, item[1])))
        for place, (row, group) in enumerate(groups):
            values = [mean_kl(row) for row in group]
            colour = (
                "tab:blue" if row.startswith("allocator") else "tab:gray" if row.startswith("random") else "tab:orange"
            )
            axes.errorbar(
                fmean(values), place, xerr=stdev(values) if len(values) > 1 else 0, fmt="o", color=colour, capsize=2
            )
        axes.set_yticks(range(len(groups)), [row for row, _ in groups], fontsize=8)
        axes.set(xscale="log", title=f"{label}, {budget} bits", xlabel="mean KL to the original, nats")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def _groups(rows: Sequence[Row], budget: float) -> dict[str, list[Row]]:
    return grouped([row for row in rows if row["budget"] == budget], lambda row: row["row"])
