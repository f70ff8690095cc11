"""Tables of the studies of files: every file by size, and who diverges least at equal size."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl

SLACK = 1.002  # two files are of equal size within this: their names and metadata differ by some bytes
TICKS = (2.5, 3, 3.5, 4, 4.25, 4.5, 5, 6, 8)  # bits, of figures
MIN_GAP = 0.07  # of the axis, between two of them
UNQUANTIZED = 16  # bits
GOAL_RIVAL, GOAL_OTHERS = 0.40, 0.25


@dataclass(frozen=True)
class File:
    """The rows of one kind of file of one quantizer."""

    quantizer: str
    kind: str
    rows: tuple[Row, ...]

    @property
    def num_bytes(self) -> int:
        """Of the largest of them."""
        return max(int(row["bytes"]) for row in self.rows)

    @property
    def bits(self) -> float:
        """Mean bits of a quantized weight."""
        return fmean(row["bits"] for row in self.rows)

    @property
    def kl(self) -> float:
        """Mean over seeds of the mean over domains."""
        return fmean(map(mean_kl, self.rows))

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.quantizer} {self.kind}"


def files(rows: Sequence[Row]) -> list[File]:
    """By size."""
    groups = grouped(rows, lambda row: (str(row["quantizer"]), str(row["kind"])))
    return sorted((File(*key, tuple(group)) for key, group in groups.items()), key=lambda file: file.num_bytes)


def best(candidates: Sequence[File], num_bytes: int) -> File | None:
    """The file of least divergence that is no larger; None where all are."""
    return min((one for one in candidates if one.num_bytes <= SLACK * num_bytes), key=lambda one: one.kl, default=None)


def report(rows: Sequence[Row], own: Sequence[str], rival: str) -> str:
    """Markdown: the comparison at the size of every file of the rival, then all files.

    Args:
        rows: Cases with ``bytes``, ``bits`` and ``domains``.
        own: Quantizers that are moeq's.
        rival: The one at whose sizes is compared.
    """
    found = files(rows)
    return f"## At equal size\n\n{_comparison(found, own, rival)}\n## Every file\n\n{_all_files(found)}"


def _comparison(found: Sequence[File], own: Sequence[str], rival: str) -> str:
    ours = [one for one in found if one.quantizer in own]
    others = [one for one in found if one.quantizer not in own]
    head = [
        rival,
        "bits",
        "KL",
        "best other no larger",
        "KL",
        "best moeq no larger",
        "bits",
        "KL",
        f"less than {rival}",
    ]
    lines = []
    for theirs in (one for one in found if one.quantizer == rival):
        other, mine = best(others, theirs.num_bytes), best(ours, theirs.num_bytes)
        if mine is None or other is None:
            continue
        less, less_other = 1 - mine.kl / theirs.kl, 1 - mine.kl / other.kl
        holds = less >= GOAL_RIVAL and less_other >= GOAL_OTHERS
        lines.append(
            [theirs.kind, f"{theirs.bits:.2f}", _kl(theirs), other.label, f"{other.kl:.4f}", mine.label]
            + [f"{mine.bits:.2f}", _kl(mine), f"{less:.0%}", f"{less_other:.0%}", "yes" if holds else "no"]
        )
    return markdown([*head, "less than the best other", f"{GOAL_RIVAL:.0%} and {GOAL_OTHERS:.0%}"], lines)


def _all_files(found: Sequence[File]) -> str:
    domains = list(found[0].rows[0]["domains"])
    head = ["quantizer", "file", "bits", "bytes", "seeds", "mean KL", "worst KL", *(f"ppl {name}" for name in domains)]
    lines = []
    for one in found:
        perplexities = [f"{fmean(exp(row['domains'][name]['nll']) for row in one.rows):.3f}" for name in domains]
        agreement = fmean(fmean(domain["top1_agreement"] for domain in row["domains"].values()) for row in one.rows)
        worst = f"{fmean(map(worst_kl, one.rows)):.4f}"
        cells = [one.quantizer, one.kind, f"{one.bits:.3f}", one.num_bytes, len(one.rows), _kl(one), worst]
        lines.append([*cells, *perplexities, f"{100 * agreement:.1f}"])
    return markdown([*head, "top-1 %"], lines)


def _kl(one: File) -> str:
    return cell([mean_kl(row) for row in one.rows], ".4f")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Divergence by bits, both axes logarithmic: every file, and the best ones of each quantizer joined by a line.

    What is not quantized stands in the table alone: it would take half of either axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, found = figure.subplots(), [one for one in files(rows) if one.bits < UNQUANTIZED]
    for quantizer, group in grouped(found, lambda one: one.quantizer).items():
        best = [one for one in group if not any(other.kl < one.kl for other in group if other.bits <= one.bits)]
        (line,) = axes.plot([one.bits for one in best], [one.kl for one in best], label=quantizer)
        axes.plot([one.bits for one in group], [one.kl for one in group], "o", color=line.get_color(), markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="bits of a quantized weight in the file", ylabel="mean KL, nats")
    ticks = readable_ticks(min(one.bits for one in found), max(one.bits for one in found))
    axes.set_xticks(ticks, [f"{bits:g}" for bits in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def readable_ticks(low: float, high: float) -> list[float]:
    """Those of ``TICKS`` between two numbers of bits whose labels do not touch on a logarithmic axis."""
    found: list[float] = []
    for bits in (bits for bits in TICKS if low * 0.95 <= bits <= high * 1.05):
        if not found or log(bits / found[-1]) >= MIN_GAP * log(high / low):
            found.append(bits)
    return found
