"""Tables of an evaluation: tasks, the data they were measured on, and their groups.

Shares of documents or tokens are in percent; every value stands with its standard error.  Pure functions from reports
to cells, which become Markdown (here) or an image (``moeq.figures_evaluation``).
"""

from collections.abc import Iterable, Sequence

from moeq.report.tables import markdown, number
from moeq.report.task_report import Description, TaskReport
from moeq.tasks.metrics import COMPARISONS, Measurement

TASK_HEADER = ("task", "metric", "value", "n", "shots", "split", "notes")
TASK_LEFT = (0, 1, 5, 6)
DATA_HEADER = ("task", "documents", "tokens", "seconds", "documents/s", "data", "sha256")
DATA_LEFT = (0, 5, 6)


def formatted(measured: Measurement, report: TaskReport, metric: str) -> str:
    """Such as "57.14 +- 0.49": shares in percent with two digits, other metrics with what tells models apart."""
    if report.is_share(metric):
        scale, digits = 100.0, 2
    elif report.kinds.get(metric) == "perplexity":
        scale, digits = 1.0, 2 if measured.value >= 10 else 3
    else:
        scale, digits = 1.0, 4
    value = number(scale * measured.value, digits)
    return value if measured.stderr is None else f"{value} +- {number(scale * measured.stderr, digits)}"


def label(report: TaskReport, metric: str) -> str:
    """Name of a metric in a table, with its unit."""
    return f"{metric} %" if report.is_share(metric) else metric


def task_rows(reports: Iterable[TaskReport]) -> list[tuple[str, ...]]:
    """Cells below ``TASK_HEADER``: a row per metric, then one per coarse group (category) and metric of the task's."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        described = report.description
        constant = (str(described["num_shots"]), described["split"], notes(described))
        for metric, measured in report.of_task.items():
            cells = (label(report, metric), formatted(measured, report, metric), str(measured.num_documents))
            rows.append((report.name, *cells, *constant))
            constant = ("", "", "")
        for group in dict.fromkeys(name for path in report.groups for name in path[:-1]):
            for metric, measured in report.measurements.get(group, {}).items():
                if metric not in COMPARISONS:
                    cells = (label(report, metric), formatted(measured, report, metric), str(measured.num_documents))
                    rows.append((f"{report.name} / {group}", *cells, "", "", ""))
    return rows


def notes(described: Description) -> str:
    """What one has to know to read a task's numbers."""
    found = []
    if described["partial"] is not None:
        found.append(f"partial: {described['num_documents']} of {described['num_available']} ({described['partial']})")
    if (chance := described.get("chance")) is not None:
        found.append(f"chance {100 * chance:.1f}")
    if described["num_truncated"]:
        cut = described.get("num_tokens_cut")
        found.append(f"{described['num_truncated']} truncated{f' by {cut} tokens in all' if cut else ''}")
    if resumed := described.get("num_resumed"):
        found.append(f"{resumed} from an earlier run")
    found += [f"{count} x {reason}" for reason, count in described["fallbacks"].items()]
    if protections := described.get("protections"):
        found.append(f"code run with {len(protections)} protections")  # results.json names them
    found += described.get("notes", ())
    return "; ".join(found)


def group_table(report: TaskReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the finest groups (subjects) of a task: a row per group, a column per metric."""
    depth = max(len(path) for path in report.groups)
    metrics = list(dict.fromkeys(metric for path in report.groups for metric in report.measurements.get(path[-1], {})))
    header = (*("category",) * (depth - 1), "group", "n", *(label(report, metric) for metric in metrics))
    rows = []
    for path in report.groups:
        found = report.measurements.get(path[-1], {})
        if found:
            cells = [formatted(found[metric], report, metric) if metric in found else "-" for metric in metrics]
            count = max(measured.num_documents for measured in found.values())
            rows.append((*path[:-1], *("",) * (depth - len(path)), path[-1], str(count), *cells))
    return header, rows


def data_rows(reports: Iterable[TaskReport]) -> list[tuple[str, ...]]:
    """Cells below ``DATA_HEADER``: where a task's documents came from, how many there were, how fast it went."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        described = report.description
        count, available, seconds = described["num_documents"], described["num_available"], described["seconds"]
        documents = str(count) if count == available else f"{count} of {available}"
        size = (str(described["num_tokens"]), f"{seconds:.1f}", number(report.documents_per_second, 1))
        rows.append((report.name, documents, *size, described["origin"], described["sha256"][:16]))
    return rows


def markdown_tasks(reports: Sequence[TaskReport]) -> str:
    """The table of all tasks."""
    return markdown(TASK_HEADER, task_rows(reports), TASK_LEFT)


def markdown_details(reports: Sequence[TaskReport]) -> str:
    """Sections below the table of tasks: the data, then the groups of each task that has any."""
    sections = [f"## Data\n\n{markdown(DATA_HEADER, data_rows(reports), DATA_LEFT)}"]
    for report in reports:
        if report.groups:
            header, rows = group_table(report)
            names = range(header.index("n"))
            sections.append(f"## {report.name} by group\n\n{markdown(header, rows, names)}")
    return "\n".join(sections)
