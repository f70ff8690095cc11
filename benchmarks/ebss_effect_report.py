"""Table and figure of ``ebss_effect.py``: means and standard deviations over seeds, and corpus mode over the oracle."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
METHOD = {0: "GPTQ", 1: "AGQ"}
COLOURS = {"prose": "tab:gray", "mixture": "tab:green", "paper": "tab:red", "corpus": "tab:blue"}


def write_report(rows: Sequence[Row], source: str, path: Path | None) -> None:
    """Print the tables; with a path, write the rows as JSON, the tables as Markdown and the curves beside it."""
    tables = f"{kl_table(rows)}\n## Corpus mode over the oracle mixture\n\n{ratio_table(rows)}"
    print(f"\n{tables}")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"origin": source, "rows": list(rows)}, indent=1) + "\n")
    figure = path.with_suffix(".png")
    draw(rows, figure)
    path.with_suffix(".md").write_text(
        f"# What calibration data is worth\n\n{source}. KL to the original in nats per token, mean and standard "
        f"deviation over seeds; 32 windows of 256 tokens of each domain.\n\n![curves]({figure.name})\n\n{tables}"
    )


def kl_table(rows: Sequence[Row]) -> str:
    """Markdown: one row per width, token count, data and method."""
    domains = list(rows[0]["domains"])
    lines = [f"| bits | tokens | data | method | {' | '.join(domains)} | mean | worst | router % |"]
    lines.append("|---" * (7 + len(domains)) + "|")
    for key, group in _grouped(rows).items():
        bits, tokens, arm, power = key
        cells = [cell([1e3 * row["domains"][domain]["kl"] for row in group]) for domain in domains]
        cells += [cell([1e3 * statistic(row) for row in group]) for statistic in (mean_kl, worst_kl)]
        cells.append(cell([100 * router_agreement(row) for row in group]))
        lines.append(f"| {bits} | {tokens // 1024}k | {arm} | {METHOD[power]} | {' | '.join(cells)} |")
    return "KL in thousandths of a nat.\n\n" + "\n".join(lines) + "\n"


def ratio_table(rows: Sequence[Row]) -> str:
    """Markdown: KL of corpus mode over that of the mixture, paired by seed; below 1 the sampled set is better."""
    domains = list(rows[0]["domains"])
    groups = _grouped(rows)
    lines = [f"| bits | tokens | method | {' | '.join(domains)} | mean | worst domain |"]
    lines.append("|---" * (5 + len(domains)) + "|")
    for (bits, tokens, arm, power), corpus in groups.items():
        oracle = {row["seed"]: row for row in groups.get((bits, tokens, "mixture", power), [])}
        pairs = [(row, oracle[row["seed"]]) for row in corpus if row["seed"] in oracle]
        if arm != "corpus" or not pairs:
            continue

        def ratio(of: Callable[[Row], float], pairs: list[tuple[Row, Row]] = pairs) -> str:
            return cell([of(sampled) / of(mixture) for sampled, mixture in pairs], 3)

        cells = [ratio(lambda row, domain=domain: row["domains"][domain]["kl"]) for domain in domains]  # type: ignore[misc]
        cells += [ratio(mean_kl), ratio(worst_kl)]
        lines.append(f"| {bits} | {tokens // 1024}k | {METHOD[power]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Mean and worst-domain KL against tokens, one panel per width; lines AGQ, dashes GPTQ, bars one deviation."""
    from matplotlib.figure import Figure

    groups = _grouped(rows)
    widths = sorted({row["bits"] for row in rows})
    figure = Figure(figsize=(4.5 * len(widths), 7), layout="constrained")
    panels = figure.subplots(2, len(widths), squeeze=False, sharex=True)
    for line, (statistic, title) in enumerate(((mean_kl, "mean over domains"), (worst_kl, "worst domain"))):
        for axes, bits in zip(panels[line], widths, strict=True):
            for arm, power in dict.fromkeys((arm, power) for _, _, arm, power in groups):
                tokens = sorted(t for b, t, a, p in groups if (b, a, p) == (bits, arm, power))
                values = [[statistic(row) for row in groups[bits, t, arm, power]] for t in tokens]
                axes.errorbar(
                    tokens, [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0 for v in values],
                    label=f"{arm}, {METHOD[power]}", color=COLOURS.get(arm), linestyle="-" if power else "--",
                    capsize=2, marker="o", markersize=3,
                )  # fmt: skip
            axes.set(xscale="log", title=f"{bits} bits, {title}", ylabel="KL to the original, nats")
    for axes in panels[-1]:
        axes.set(xlabel="calibration tokens")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def mean_kl(row: Row) -> float:
    """Mean over domains, nats."""
    return fmean(domain["kl"] for domain in row["domains"].values())


def worst_kl(row: Row) -> float:
    """Of the domain with the largest divergence, nats."""
    return max(domain["kl"] for domain in row["domains"].values())


def router_agreement(row: Row) -> float:
    """Share of (token, block) pairs that keep their experts, mean over domains."""
    return fmean(domain["router_agreement"] for domain in row["domains"].values())


def _grouped(rows: Sequence[Row]) -> dict[tuple[int, int, str, int], list[Row]]:
    groups: dict[tuple[int, int, str, int], list[Row]] = {}
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    order = sorted(rows, key=lambda r: (r["bits"], r["tokens"], arms.index(r["arm"]), r["affinity_power"], r["seed"]))
    for row in order:
        groups.setdefault((row["bits"], row["tokens"], row["arm"], row["affinity_power"]), []).append(row)
    return groups


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there are several."""
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
