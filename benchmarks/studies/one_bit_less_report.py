"""Tables of the study of one bit less: whether b - 1 bits diverge as little as others do at b, then every recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl

BEST, BEST_BY_SIZE = "moeq, best", "moeq, best, groups of 128"
DATA = {"mixture": "the mixture of the evaluated domains", "corpus": "what the model wrote"}


@dataclass(frozen=True)
class Other:
    """Another quantizer at one width on one kind of data."""

    bits: float
    peer: str
    data: str
    rows: tuple[Row, ...]

    @property
    def kl(self) -> float:
        """Mean over seeds of the mean over domains."""
        return fmean(map(mean_kl, self.rows))


def best_others(rows: Sequence[Row], data: str) -> dict[float, Other]:
    """By bits, the other quantizer of least divergence on a kind of data; moeq's own row there is none of them."""
    groups = grouped(
        [row for row in rows if row["data"] == data and row["peer"] != "moeq"],
        lambda row: (float(row["bits"]), str(row["peer"])),
    )
    found: dict[float, Other] = {}
    for (bits, peer), group in groups.items():
        one = Other(bits, peer, data, tuple(group))
        if bits not in found or one.kl < found[bits].kl:
            found[bits] = one
    return found


def bars(own: Sequence[Row], others: Sequence[Row]) -> str:
    """Whether the best recipes at b - 1 bits diverge no more than the best other at b, on whatever data.

    Between two whole widths the bar is the geometric mean of those of its neighbours.
    """
    known = [best_others(others, data) for data in DATA]
    lowest = {bits: min(found[bits].kl for found in known if bits in found) for found in known for bits in found}
    best = [row for row in own if row["recipe"] in (BEST, BEST_BY_SIZE)]
    lines = []
    for (bits, recipe), group in sorted(grouped(best, lambda row: (row["bits"], row["recipe"])).items()):
        low, high = lowest.get(int(bits + 1)), lowest.get(-int(-(bits + 1) // 1))
        if low is None or high is None:
            continue
        bar, kl = (low * high) ** 0.5, fmean(map(mean_kl, group))
        lines.append([f"{bits:g}", recipe, len(group), _kl(group), f"{bits + 1:g}", f"{bar:.4f}", f"{kl / bar:.2f}",
                      "yes" if kl <= bar else "no"])  # fmt: skip
    head = ["bits", "recipe", "seeds", "mean KL", "bits of the best other", "KL", "ratio", "holds"]
    return f"### One bit less\n\n{markdown(head, lines)}" if lines else ""


def table(own: Sequence[Row], others: Sequence[Row]) -> str:
    """Every recipe and the best other quantizers, by bits."""
    domains = list(own[0]["domains"])
    tasks = list(dict.fromkeys(name for row in own for name in row.get("accuracy", {})))
    recipes = grouped(own, lambda row: (float(row["bits"]), str(row["recipe"])))
    groups = [(bits, recipe, group) for (bits, recipe), group in recipes.items()]
    for data, words in DATA.items():
        groups += [(b, f"{o.peer}, on {words}", list(o.rows)) for b, o in best_others(others, data).items()]
    head = ["bits", "with scales", "recipe", "seeds", "mean KL", "worst KL", *(f"ppl {name}" for name in domains)]
    head += ["top-1 %", "router %", *(f"{name} %" for name in tasks), "s of a core", "peak MB"]
    lines = []
    for bits, recipe, group in sorted(groups, key=lambda one: (one[0], -fmean(map(mean_kl, one[2])))):
        cells = [f"{bits:g}", _mean(group, "average_bits", ".2f"), recipe, len(group), _kl(group)]
        cells += [cell([worst_kl(row) for row in group], ".4f")]
        cells += [f"{fmean(exp(row['domains'][name]['nll']) for row in group):.2f}" for name in domains]
        top1 = fmean(fmean(domain["top1_agreement"] for domain in row["domains"].values()) for row in group)
        cells += [f"{100 * top1:.1f}", f"{100 * fmean(map(router_agreement, group)):.1f}"]
        cells += [_accuracy(group, name) for name in tasks]
        costs = [row if "recipe" in row else row["report"] for row in group]
        factors = " + F" if any(row.get("factors_seconds", 0) is None for row in group) else ""
        lines.append([*cells, _mean(costs, "cpu_seconds", ".0f") + factors, _mean(costs, "peak_mb", ".0f")])
    return f"### Every recipe\n\n{markdown(head, lines)}"


def _kl(rows: Sequence[Row]) -> str:
    return cell([mean_kl(row) for row in rows], ".4f")


def _mean(rows: Sequence[Row], name: str, form: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):{form}}" if values else "-"


def _accuracy(rows: Sequence[Row], name: str) -> str:
    values = [row["accuracy"][name] for row in rows if name in row.get("accuracy", {})]
    return f"{100 * fmean(values):.1f}" if values else "-"
