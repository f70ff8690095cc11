"""Table of what other quantizers reach on one model: one row per setting and peer, mean and spread of seeds."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl

SETTING = ("data", "tokens", "bits", "group")
HEAD = (
    "data", "tokens", "bits", "group", "quantizer", "seeds", "KL mean", "KL worst", "router %", "seconds", "CPU s",
    "peak MB", "broken", "zeroed columns", "changed",
)  # fmt: skip

LEGEND = """\
Data: `mixture` a quarter of each evaluated domain (what only an oracle knows), `corpus` what the model wrote itself,
`prose` WikiText-2. KL: divergence from the original in nats per token, mean of the four domains and the worst; mean
+- standard deviation over seeds. Router: share of (token, block) pairs that go to the same experts. Seconds are those
of one thread on a machine that did other work; CPU s are not disturbed by it, loading and saving are in neither.
Processors without bfloat16 products (avx2 alone) take some ten times the seconds for quantizers that compute in
bfloat16; a row with seeds of both kinds has their mean.
Broken: experts with a constant weight or one that is not finite. Zeroed columns: input columns of weights that were
not zero. Changed: routers and other weights that should not change. The last three are sums over seeds. What the
names of the quantizers mean: [`benchmarks/peers/README.md`](../peers/README.md). Every result that
was kept is in the table, also those of earlier commands."""


def table(rows: Sequence[Row]) -> str:
    """Markdown, settings in order, the smallest mean divergence first."""
    lines = []
    for setting, here in sorted(grouped(rows, lambda row: tuple(row[key] for key in SETTING)).items()):
        of = grouped(here, lambda row: row["peer"])
        lines += [line(setting, peer, of[peer]) for peer in sorted(of, key=lambda name: mean(map(mean_kl, of[name])))]
    return markdown(HEAD, lines)


def line(setting: tuple[Any, ...], peer: str, rows: Sequence[Row]) -> list[Any]:
    """The cells of a peer in one setting."""
    damages = [row["damage"] for row in rows if "damage" in row]
    data, tokens, bits, group = setting
    peaks = [row["report"]["peak_mb"] for row in rows if "peak_mb" in row["report"]]
    return [
        data, tokens, bits, group or "channel", peer, len(rows), cell([mean_kl(row) for row in rows], ".4f"),
        cell([worst_kl(row) for row in rows], ".4f"), cell([100 * router_agreement(row) for row in rows], ".1f"),
        f"{mean(row['report']['seconds'] for row in rows):.0f}",
        f"{mean(row['report']['cpu_seconds'] for row in rows):.0f}", f"{max(peaks):.0f}" if peaks else "",
        sum(d["broken_experts"] for d in damages), sum(d["zeroed_columns"] for d in damages),
        sum(d["changed_routers"] + d["changed_others"] for d in damages),
    ]  # fmt: skip


def versions(rows: Sequence[Row]) -> str:
    """Packages of all environments, without transformers: each has its own, see benchmarks/peers/README.md."""
    found = {package: version for row in rows for package, version in row["report"]["versions"].items()}
    found.pop("transformers", None)
    return ", ".join(f"{package} {version}" for package, version in sorted(found.items()))
