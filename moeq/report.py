"""The result table: one row per evaluated model, as ``results.json`` and as a Markdown table.

A row condenses the metrics of all evaluation sets: KL, top-1 and router agreement are means over the sets that have
them (every set has the same number of tokens, so no domain outweighs another), ``kl_worst`` is the worst set's KL, and
perplexity is kept by domain, since a mean over domains means nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from statistics import fmean

from moeq.run import write_json

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"


@dataclass(frozen=True)
class ResultRow:
    """What one model scored.  None means not measured: the original has nothing to be compared with.

    Attributes:
        method: How the model was made: original, RTN, GPTQ, MoEQuant, ...
        bits: Nominal bits per quantized weight; 16 for a bfloat16 original.
        average_bits: Bits per quantized weight, scales and zero points included.
        bytes: Size of the weights on disk.
        kl_mean: Mean over sets of the mean KL divergence to the original, nats per token.
        kl_worst: The largest of them.
        perplexity: Perplexity by domain.
        top1_agreement: Share of positions with the original's most likely token, 0 to 1.
        router_agreement: Share of (token, block) pairs with the original's experts, 0 to 1.
        exact_match: Share of arithmetic problems answered right, 0 to 1.
        seconds: Wall time of making the model (0 for the original).
    """

    method: str
    bits: float
    average_bits: float
    bytes: int
    kl_mean: float | None = None
    kl_worst: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    top1_agreement: float | None = None
    router_agreement: float | None = None
    exact_match: float | None = None
    seconds: float = 0.0


def result_row(
    metrics_by_set: Mapping[str, Mapping[str, float]],
    *,
    method: str,
    bits: float,
    average_bits: float,
    num_bytes: int,
    seconds: float = 0.0,
) -> ResultRow:
    """Condense the metrics of each evaluation set (``SetMetrics.compute``, by set name) into a row."""

    def values(name: str) -> list[float]:
        return [metrics[name] for metrics in metrics_by_set.values() if name in metrics]

    def mean(name: str) -> float | None:
        return fmean(found) if (found := values(name)) else None

    return ResultRow(
        method=method,
        bits=bits,
        average_bits=average_bits,
        bytes=num_bytes,
        kl_mean=mean("kl"),
        kl_worst=max(values("kl"), default=None),
        perplexity={name: metrics["perplexity"] for name, metrics in metrics_by_set.items() if "perplexity" in metrics},
        top1_agreement=mean("top1_agreement"),
        router_agreement=mean("router_agreement"),
        exact_match=mean("exact_match"),
        seconds=seconds,
    )


def write_results(rows: Sequence[ResultRow], folder: Path) -> None:
    """Write ``results.json`` and ``results.md`` into a run folder, each atomically."""
    write_json(folder / RESULTS_JSON, [asdict(row) for row in rows])
    temporary = folder / f".{RESULTS_MARKDOWN}.tmp"
    temporary.write_text(markdown_table(rows), encoding="utf8")
    os.replace(temporary, folder / RESULTS_MARKDOWN)


def read_results(path: Path) -> list[ResultRow]:
    """Rows of a ``results.json``; raises ValueError where the file does not hold such rows."""
    known = {f.name for f in fields(ResultRow)}
    rows = json.loads(path.read_text(encoding="utf8"))
    for row in rows:
        if unknown := sorted(row.keys() - known):
            raise ValueError(
                f"{path} has rows with unknown fields {unknown}; it was written by another version of moeq"
            )
    return [ResultRow(**row) for row in rows]


def markdown_table(rows: Sequence[ResultRow]) -> str:
    """Markdown table of the rows, columns padded so that it reads well on a terminal too; ends with a newline."""
    domains = list(dict.fromkeys(domain for row in rows for domain in row.perplexity))
    header = ["method", "bits", "avg bits", "MB", "KL mean", "KL worst", *(f"ppl {domain}" for domain in domains)]
    header += ["top-1 %", "router %", "exact %", "seconds"]
    cells = [header, *([*_cells(row, domains)] for row in rows)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]
    lines = [_line([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    rule = _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _cells(row: ResultRow, domains: Sequence[str]) -> list[str]:
    return [
        row.method,
        f"{row.bits:g}",
        f"{row.average_bits:.2f}",
        f"{row.bytes / 1e6:.1f}",
        _number(row.kl_mean, 4),
        _number(row.kl_worst, 4),
        *(_number(row.perplexity.get(domain), 2) for domain in domains),
        *(_number(share and 100 * share, 1) for share in (row.top1_agreement, row.router_agreement, row.exact_match)),
        _number(row.seconds, 0),
    ]


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isfinite(value) and abs(value) < 1e6 else f"{value:.2e}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
