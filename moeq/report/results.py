"""The results of an evaluation: ``results.json`` and ``results.md``, with one row per evaluated model.

A row condenses the metrics of all tasks: KL, top-1 and router agreement are means over the tasks that have them, so
that no task outweighs another, ``kl_worst`` is the worst task's KL, and perplexity and accuracy are kept by task, since
a mean of perplexities means nothing.  What one run of ``validate`` measured in detail stands below its row: every
metric of every task and group with its standard error, the data, the settings and the versions.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from moeq.disk.atomic import write_json, write_text
from moeq.report.tables import markdown, number
from moeq.report.task_report import TaskReport
from moeq.report.task_tables import markdown_details, markdown_tasks

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"
FORMAT = 2


@dataclass(frozen=True)
class ResultRow:
    """What one model scored.  None means not measured: the original has nothing to be compared with.

    Attributes:
        method: How the model was made: original, RTN, GPTQ, MoEQuant, ...
        bits: Nominal bits per quantized weight; 16 for a bfloat16 original.
        average_bits: Bits per quantized weight, scales and zero points included.
        bytes: Size of the weights on disk.
        kl_mean: Mean over texts (over tasks where there are none) of the mean KL divergence to the original, nats per
            token; likewise the agreements.
        kl_worst: The largest of them.
        perplexity: Perplexity by task (domain).
        top1_agreement: Share of positions with the original's most likely token, 0 to 1.
        router_agreement: Share of (token, block) pairs with the original's experts, 0 to 1.
        exact_match: Share of arithmetic problems answered right, 0 to 1.
        seconds: Wall time of making the model (0 for the original).
        accuracy: The first share among the metrics of each other task, 0 to 1.
        partial: Whether documents of a task were left out.
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
    accuracy: dict[str, float] = field(default_factory=dict)
    partial: bool = False


def result_row(
    reports: Iterable[TaskReport],
    *,
    method: str,
    bits: float,
    average_bits: float,
    num_bytes: int,
    seconds: float = 0.0,
) -> ResultRow:
    """Condense the measurements of all tasks into a row."""
    reports = list(reports)
    # Of running text there are as many tokens in each domain; answers of a few tokens would count as much as it.
    compared = [report for report in reports if report.kind == "Windows"] or reports

    def values(name: str) -> list[float]:
        return [report.of_task[name].value for report in compared if name in report.of_task]

    def mean(name: str) -> float | None:
        return fmean(found) if (found := values(name)) else None

    def by_task(*, share: bool) -> dict[str, float]:
        firsts = {report.name: (report, report.first_of(share=share)) for report in reports}
        return {name: report.of_task[metric].value for name, (report, metric) in firsts.items() if metric is not None}

    with_problems = [report for report in reports if "exact_match" in report.of_task]
    exact = [report.of_task["exact_match"].value for report in with_problems]
    return ResultRow(
        method=method,
        bits=bits,
        average_bits=average_bits,
        bytes=num_bytes,
        kl_mean=mean("kl"),
        kl_worst=max(values("kl"), default=None),
        perplexity=by_task(share=False),
        top1_agreement=mean("top1_agreement"),
        router_agreement=mean("router_agreement"),
        exact_match=fmean(exact) if exact else None,
        seconds=seconds,
        accuracy={
            name: value for name, value in by_task(share=True).items() if name not in {r.name for r in with_problems}
        },
        partial=any(report.description["partial"] is not None for report in reports),
    )


def write_results(
    rows: Sequence[ResultRow],
    folder: Path,
    reports: Sequence[TaskReport] = (),
    setting: Mapping[str, Any] | None = None,
) -> None:
    """Write ``results.json`` and ``results.md`` into a run folder, each atomically.

    Args:
        rows: One per model.
        folder: Created where it does not exist.
        reports: Of the tasks of the one model of an evaluation; none for a comparison of several.
        setting: What else belongs to it: settings, versions, device, model.
    """
    tasks = [report.as_json() for report in reports]
    data = {"format": FORMAT, "rows": [asdict(row) for row in rows], "tasks": tasks, **(setting or {})}
    write_json(folder / RESULTS_JSON, data)
    write_text(folder / RESULTS_MARKDOWN, markdown_results(rows, reports, setting))


def read_results(path: Path) -> list[ResultRow]:
    """Rows of a ``results.json``; raises ValueError where the file does not hold such rows."""
    known = {f.name for f in fields(ResultRow)}
    data = json.loads(path.read_text(encoding="utf8"))
    rows = data if isinstance(data, list) else data.get("rows", [])  # format 1 was the list of rows
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {data.get('format')}, this version of moeq reads {FORMAT}; write it again with validate"
        )
    for row in rows:
        if unknown := sorted(row.keys() - known):
            raise ValueError(
                f"{path} has rows with unknown fields {unknown}; it was written by another version of moeq"
            )
    return [ResultRow(**row) for row in rows]


def markdown_results(
    rows: Sequence[ResultRow], reports: Sequence[TaskReport] = (), setting: Mapping[str, Any] | None = None
) -> str:
    """``results.md``: the rows; of one evaluation also its tasks, their data and groups, and the versions."""
    parts = [markdown_table(rows)]
    if reports:
        parts += [f"## Tasks\n\n{markdown_tasks(reports)}", markdown_details(reports)]
    if setting and "versions" in setting:
        versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        where = ", ".join(
            f"{key} {setting[key]}" for key in ("device", "dtype", "compute_dtype", "num_ranks") if key in setting
        )
        parts.append("; ".join(part for part in (versions, where) if part) + ".\n")
    return "\n".join(parts)


def markdown_table(rows: Sequence[ResultRow]) -> str:
    """Markdown table of the rows; columns of what no row has are left out."""
    columns: dict[str, list[str]] = {
        "method": [f"{row.method} (partial)" if row.partial else row.method for row in rows],
        "bits": [f"{row.bits:g}" for row in rows],
        "avg bits": [f"{row.average_bits:.2f}" for row in rows],
        "MB": [f"{row.bytes / 1e6:.1f}" for row in rows],
    }
    optional: list[tuple[str, list[float | None], int]] = [
        ("KL mean", [row.kl_mean for row in rows], 4),
        ("KL worst", [row.kl_worst for row in rows], 4),
    ]
    for domain in dict.fromkeys(domain for row in rows for domain in row.perplexity):
        optional.append((f"ppl {domain}", [row.perplexity.get(domain) for row in rows], 2))
    tasks = list(dict.fromkeys(task for row in rows for task in row.accuracy))
    for task in tasks:
        optional.append((f"{task} %", [_percent(row.accuracy.get(task)) for row in rows], 2))
    if len(tasks) > 1:
        # A mean over other tasks than the next row's would look like a comparison.
        complete = [fmean(row.accuracy.values()) if len(row.accuracy) == len(tasks) else None for row in rows]
        optional.append(("mean %", [_percent(value) for value in complete], 2))
    optional += [
        ("top-1 %", [_percent(row.top1_agreement) for row in rows], 1),
        ("router %", [_percent(row.router_agreement) for row in rows], 1),
        ("exact %", [_percent(row.exact_match) for row in rows], 1),
    ]
    for name, values, digits in optional:
        if any(value is not None for value in values):
            columns[name] = [number(value, digits) for value in values]
    columns["seconds"] = [number(row.seconds, 0) for row in rows]
    return markdown(list(columns), list(zip(*columns.values(), strict=True)))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
