"""Tables, figure and verdicts of ``quantmoe_bench.py``; means and standard deviations over seeds."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Entry = dict[str, Any]
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


def write_report(entries: Sequence[Entry], label: str, source: str, path: Path | None) -> None:
    """Print the tables; with a path, write the entries as JSON, the tables as Markdown and the figure beside it."""
    budgets = sorted({entry["budget"] for entry in entries})
    tables = "\n".join(f"## {budget} bits\n\n{table(entries, budget)}" for budget in budgets)
    text = f"{tables}\n## Findings of the paper on this model\n\n{findings(entries)}"
    print(f"\n{text}")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"origin": source, "entries": list(entries)}, indent=1) + "\n")
    figure = path.with_suffix(".png")
    draw(entries, label, figure)
    path.with_suffix(".md").write_text(
        f"# Bit allocation: {label} model\n\n{source}.\n\nKL to the original in nats per token, perplexity by domain, "
        "arithmetic problems answered right; mean and standard deviation over seeds (calibration set, survey and "
        f"random controls). Sorted by mean KL.\n\n![KL by budget]({figure.name})\n\n{text}"
    )


def table(entries: Sequence[Entry], budget: float) -> str:
    """Markdown: one row per way to give bits, the best first."""
    groups = _groups(entries, budget)
    domains = list(entries[0]["domains"])
    head = ["row", "bits", "with scales", "kB", *(f"KL {d}" for d in domains), "KL mean", "KL worst"]
    head += [*(f"ppl {d}" for d in domains), "exact %"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, group in sorted(groups.items(), key=lambda item: fmean(map(mean_kl, item[1]))):
        cells = [f"{fmean(e['code_bits'] for e in group):.3f}", f"{fmean(e['average_bits'] for e in group):.3f}"]
        cells.append(f"{fmean(e['bytes'] for e in group) / 1e3:.0f}")
        cells += [_cell([e["domains"][d]["kl"] for e in group], 4) for d in domains]
        cells += [_cell([mean_kl(e) for e in group], 4), _cell([worst_kl(e) for e in group], 4)]
        cells += [_cell([math.exp(e["domains"][d]["nll"]) for e in group], 2) for d in domains]
        cells.append(_cell([100 * e["exact_match"] for e in group], 1))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def findings(entries: Sequence[Entry]) -> str:
    """Markdown: ratio of mean KL of the two sides of each finding, paired by seed; below 1 it holds."""
    budgets = sorted({entry["budget"] for entry in entries})
    lines = [f"| finding | {' | '.join(f'{b} bits' for b in budgets)} |", "|---" * (1 + len(budgets)) + "|"]
    for name, better, worse in FINDINGS:
        cells = []
        for budget in budgets:
            groups = _groups(entries, budget)
            other = {entry["seed"]: entry for entry in groups.get(worse, [])}
            pairs = [(e, other[e["seed"]]) for e in groups.get(better, []) if e["seed"] in other]
            cells.append(_cell([mean_kl(a) / mean_kl(b) for a, b in pairs], 2) if pairs else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "KL of the left side over KL of the right side; below 1 the finding holds.\n\n" + "\n".join(lines) + "\n"


def draw(entries: Sequence[Entry], label: str, path: Path) -> None:
    """Mean KL of every row, one panel per budget, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    budgets = sorted({entry["budget"] for entry in entries})
    figure = Figure(figsize=(5.2 * len(budgets), 7.5), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        groups = sorted(_groups(entries, budget).items(), key=lambda item: -fmean(map(mean_kl, item[1])))
        for place, (row, group) in enumerate(groups):
            values = [mean_kl(entry) for entry in group]
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


def mean_kl(entry: Entry) -> float:
    """Mean over domains, nats."""
    return fmean(domain["kl"] for domain in entry["domains"].values())


def worst_kl(entry: Entry) -> float:
    """Of the domain with the largest divergence, nats."""
    return max(domain["kl"] for domain in entry["domains"].values())


def _groups(entries: Sequence[Entry], budget: float) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry["budget"] == budget:
            groups.setdefault(entry["row"], []).append(entry)
    return groups


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
