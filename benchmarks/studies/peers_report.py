"""Table of what other quantizers reach on the bundled model: one row per setting and peer, mean and spread of seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]
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
Broken: experts with a constant weight or one that is not finite. Zeroed columns: input columns of weights that were
not zero. Changed: routers and other weights that should not change. The last three are sums over seeds. What the
names of the quantizers mean: [`benchmarks/peers/README.md`](../peers/README.md). The command above is the last of
several: every result that was kept is in the table."""


def kl_mean(row: Row) -> float:
    """Divergence from the original, nats per token, mean of the domains."""
    return mean(domain["kl"] for domain in row["domains"].values())


def kl_worst(row: Row) -> float:
    """Divergence on the domain that suffered most."""
    return max(domain["kl"] for domain in row["domains"].values())


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds, such as ``0.0485 +- 0.0012``."""
    deviation = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def line(setting: tuple[Any, ...], peer: str, rows: Sequence[Row]) -> str:
    """The Markdown row of a peer in one setting."""
    damages = [row["damage"] for row in rows if "damage" in row]
    data, tokens, bits, group = setting
    routers = [100 * mean(d["router_agreement"] for d in row["domains"].values()) for row in rows]
    peaks = [row["report"]["peak_mb"] for row in rows if "peak_mb" in row["report"]]
    cells = [
        data, tokens, bits, group or "channel", peer, len(rows), spread([kl_mean(row) for row in rows], 4),
        spread([kl_worst(row) for row in rows], 4), spread(routers, 1),
        f"{mean(row['report']['seconds'] for row in rows):.0f}",
        f"{mean(row['report']['cpu_seconds'] for row in rows):.0f}", f"{max(peaks):.0f}" if peaks else "",
        sum(d["broken_experts"] for d in damages), sum(d["zeroed_columns"] for d in damages),
        sum(d["changed_routers"] + d["changed_others"] for d in damages),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def table(rows: Sequence[Row]) -> str:
    """Markdown, settings in order, the smallest mean divergence first."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for setting in sorted({tuple(row[key] for key in SETTING) for row in rows}):
        here = [row for row in rows if tuple(row[key] for key in SETTING) == setting]
        of = {peer: [row for row in here if row["peer"] == peer] for peer in {row["peer"] for row in here}}
        for peer in sorted(of, key=lambda name: mean(map(kl_mean, of[name]))):
            lines.append(line(setting, peer, of[peer]))
    return "\n".join(lines)


def write_report(rows: Sequence[Row], source: str, path: Path | None) -> None:
    """Print the table; with a path, write all rows there and the table beside them."""
    versions = {package: found for row in rows for package, found in row["report"]["versions"].items()}
    # Each environment has its own; benchmarks/peers/README.md names them.
    versions.pop("transformers", None)
    packages = ", ".join(f"{package} {found}" for package, found in sorted(versions.items()))
    text = f"# Other quantizers on the bundled model\n\n{source}; {packages}.\n\n{LEGEND}\n\n{table(rows)}\n"
    print(text, flush=True)
    if path:
        path.write_text(json.dumps({"origin": source, "versions": versions, "rows": list(rows)}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
