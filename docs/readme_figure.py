"""The picture of README.md: divergence of 2, 3 and 4 bits by method.

``python docs/readme_figure.py`` writes assets/divergence.png from the results of two studies: moeq's own methods and
rounding to nearest (quantizers.json), and other quantizers on the same model and tokens (peers.json).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "assets" / "divergence.png"
BITS = (2, 3, 4)
GROUP_SIZE, TOKENS = 64, 16384
# Arms of quantizers.json and what README calls them.
OURS = {
    "RTN": "round to nearest",
    "AGQ, damping 0.1, router": "moeq",
    "AGQ, damping 0.1, router, learned": "moeq, rounding learned",
}
PEERS = {"autoround": "AutoRound", "gptqmodel": "GPTQModel", "llmcompressor": "llm-compressor"}
COLOURS = {"RTN": "#b0b0b0", "peer": "#d98c4a", "moeq": "#2f6f9f"}


@dataclass(frozen=True)
class Bar:
    """Mean KL divergence of one method at one width, in nats, over its seeds.

    Attributes:
        label: Name of the method.
        group: Key of ``COLOURS``.
        kl: KL divergence of every seed, each the mean of the domains.
    """

    label: str
    group: str
    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.kl)

    def text(self) -> str:
        """What stands beside the bar: the mean, with the standard deviation where there are several seeds."""
        spread = f" +- {stdev(self.kl):.4f}" if len(self.kl) > 1 else ""
        return f"{self.mean:.4f}{spread}" + ("" if self.group == "RTN" else f"  ({_seeds(len(self.kl))})")


def bars(bits: int) -> list[Bar]:
    """Round to nearest, the best of the other quantizers on any data, and moeq, at one width."""
    ours = _rows("quantizers", bits=bits, group_size=GROUP_SIZE, rotation=False)
    found = [
        Bar(label, "RTN" if arm == "RTN" else "moeq", tuple(_kl(row) for row in ours if row["arm"] == arm))
        for arm, label in OURS.items()
    ]
    return [found[0], _best_peer(bits), *found[1:]]


def _best_peer(bits: int) -> Bar:
    """The quantizer, with the options and the data, of the least mean divergence: the hardest to compare with."""
    rows = [row for row in _rows("peers", bits=bits, group=GROUP_SIZE, tokens=TOKENS) if row["peer"] != "moeq"]
    by_setting: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        by_setting.setdefault((row["peer"], row["data"]), []).append(_kl(row))
    (peer, _), kl = min(by_setting.items(), key=lambda item: fmean(item[1]))
    return Bar(f"best peer: {PEERS[peer.split('_')[0]]}", "peer", tuple(kl))


def _rows(study: str, **wanted: Any) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / f"{study}.json").read_text(encoding="utf8"))["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _kl(row: dict[str, Any]) -> float:
    return fmean(domain["kl"] for domain in row["domains"].values())


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count > 1 else "")


def figure() -> Figure:
    """A panel of horizontal bars for each width."""
    picture = Figure(figsize=(8.6, 3.5), layout="constrained")
    for bits, axes in zip(BITS, picture.subplots(len(BITS), 1), strict=True):
        _panel(axes, bits, bars(bits))
    picture.axes[-1].set_xlabel(
        "KL divergence from the original (nats per token; mean +- standard deviation)", fontsize=8
    )
    return picture


def _panel(axes: Axes, bits: int, shown: Sequence[Bar]) -> None:
    axes.barh([bar.label for bar in shown], [bar.mean for bar in shown], color=[COLOURS[b.group] for b in shown])
    for place, bar in enumerate(shown):
        axes.text(bar.mean, place, f" {bar.text()}", va="center", fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(bar.mean for bar in shown))
    axes.set_ylabel(f"{bits} bits", fontsize=9)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    figure().savefig(PICTURE, dpi=110, metadata={"Software": None})
