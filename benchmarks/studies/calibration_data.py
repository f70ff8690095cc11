"""What calibration data is worth: divergence from the original by domain, after GPTQ and AGQ on four kinds of data.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.calibration_data --json benchmarks/results/calibration_data.json

Data: prose alone; the mixture of all evaluated domains (an oracle: who has a real model does not know them); EBSS in
paper mode; EBSS in corpus mode.  Five seeds, 3 and 4 bits in groups of 64, 8k, 32k and 128k tokens.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import ClassVar

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl
from benchmarks.lab.trial import fit

METHOD = {0: "GPTQ", 1: "AGQ"}
COLOURS = {"prose": "tab:gray", "mixture": "tab:green", "paper": "tab:red", "corpus": "tab:blue"}
Setting = tuple[int, int, str, int]  # bits, tokens, data, power of the affinity


@dataclass(frozen=True, order=True)
class Case:
    """One calibration and quantization."""

    num_windows: int
    seed: int
    arm: str
    bits: int
    affinity_power: int


class CalibrationData(Study[Case]):
    """Every kind and amount of data with both methods."""

    title = "What calibration data is worth"
    legend = (
        "KL to the original in nats per token, mean and standard deviation over seeds; 32 windows of 256 tokens of "
        "each domain."
    )
    seeds = (0, 1, 2, 3, 4)
    quick: ClassVar = {"seeds": [0], "windows": [32], "bits": [3], "powers": [1]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--arms", nargs="+", default=["prose", "mixture", "paper", "corpus"])
        parser.add_argument("--windows", type=int, nargs="+", default=[32, 128, 512], help=f"of {LENGTH} tokens")
        parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
        parser.add_argument("--powers", type=int, nargs="+", default=[0, 1], help="of the affinity: 0 is GPTQ, 1 AGQ")

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(*values) for values in product(o.windows, o.seeds, o.arms, o.bits, o.powers)]

    def measure(self, case: Case) -> Row:
        folder, num_written = self.options.folder, max(self.options.windows)
        ids_NL = calibration_set(self.yardstick, case.arm, case.num_windows, case.seed, folder, num_written)
        module = fit(ids_NL, name=MODEL, bits=case.bits, group_size=64, affinity_power=float(case.affinity_power))
        return {"tokens": case.num_windows * LENGTH, "domains": self.yardstick.row(module.model)}

    def report(self, rows: Sequence[Row]) -> str:
        return f"{kl_table(rows)}\n## Corpus mode over the oracle mixture\n\n{ratio_table(rows)}"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


def kl_table(rows: Sequence[Row]) -> str:
    """Markdown: one row per width, token count, data and method."""
    domains = list(rows[0]["domains"])
    lines = []
    for key, group in _grouped(rows).items():
        bits, tokens, arm, power = key
        cells = [cell([1e3 * row["domains"][domain]["kl"] for row in group]) for domain in domains]
        cells += [cell([1e3 * statistic(row) for row in group]) for statistic in (mean_kl, worst_kl)]
        cells.append(cell([100 * router_agreement(row) for row in group]))
        lines.append([bits, f"{tokens // 1024}k", arm, METHOD[power], *cells])
    head = ["bits", "tokens", "data", "method", *domains, "mean", "worst", "router %"]
    return f"KL in thousandths of a nat.\n\n{markdown(head, lines)}"


def ratio_table(rows: Sequence[Row]) -> str:
    """Markdown: KL of corpus mode over that of the mixture, paired by seed; below 1 the sampled set is better."""
    domains = list(rows[0]["domains"])
    groups = _grouped(rows)
    lines = []
    for (bits, tokens, arm, power), corpus in groups.items():
        oracle = {row["seed"]: row for row in groups.get((bits, tokens, "mixture", power), [])}
        pairs = [(row, oracle[row["seed"]]) for row in corpus if row["seed"] in oracle]
        if arm != "corpus" or not pairs:
            continue

        def ratio(of: Callable[[Row], float], pairs: list[tuple[Row, Row]] = pairs) -> str:
            return cell([of(sampled) / of(mixture) for sampled, mixture in pairs], ".3f")

        cells = [ratio(lambda row, domain=domain: row["domains"][domain]["kl"]) for domain in domains]  # type: ignore[misc]
        cells += [ratio(mean_kl), ratio(worst_kl)]
        lines.append([bits, f"{tokens // 1024}k", METHOD[power], *cells])
    return markdown(["bits", "tokens", "method", *domains, "mean", "worst domain"], lines)


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


def _grouped(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    order = sorted(rows, key=lambda r: (r["bits"], r["tokens"], arms.index(r["arm"]), r["affinity_power"], r["seed"]))
    return grouped(order, lambda row: (row["bits"], row["tokens"], row["arm"], row["affinity_power"]))


if __name__ == "__main__":
    CalibrationData.main()
