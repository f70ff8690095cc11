"""Figures of an evaluation: bars with standard errors by task and by group, and tables as images.

Pure functions from plain data to a matplotlib figure; nothing is shown or written here, and matplotlib is imported
where it is used (see ``moeq.report.figures_fit``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from moeq.report.task_report import TaskReport
from moeq.tasks.metrics import COMPARISONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Heights of a bar, of the gap between two lines of bars, and of what surrounds the bars of a panel.
BAR_INCHES, GAP_INCHES, FRAME_INCHES = 0.19, 0.1, 0.75
COLUMN_INCHES = 9.0  # panels that are higher together stand in two columns
CHARACTER_INCHES, LINE_INCHES = 0.083, 0.24  # of the monospaced font of tables, 9 points


@dataclass(frozen=True)
class Bar:
    """One bar: on which line it is, what it shows, and how sure that is."""

    line: str
    series: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Panel:
    """Bars of one scale."""

    title: str
    bars: tuple[Bar, ...]
    chance: dict[str, float]  # by line

    @property
    def lines(self) -> dict[str, list[Bar]]:
        """Bars by their name along the vertical axis, from the top."""
        lines: dict[str, list[Bar]] = {}
        for bar in self.bars:
            lines.setdefault(bar.line, []).append(bar)
        return lines

    @property
    def inches(self) -> float:
        """Height of its bars, with the gaps between lines."""
        return BAR_INCHES * len(self.bars) + GAP_INCHES * len(self.lines)


def task_bars(reports: Sequence[TaskReport]) -> "Figure | None":
    """Metrics of all tasks: accuracies, perplexities and comparisons each on a scale of their own; None without any."""
    panels = [
        _panel(reports, "accuracy, %", lambda r, m: m not in COMPARISONS and r.is_share(m)),
        _panel(reports, "perplexity", lambda r, m: r.kinds.get(m) == "perplexity"),
        _panel(reports, "bits", lambda r, m: r.kinds.get(m) == "bits"),
        _panel(reports, "KL divergence to the original, nats", lambda _, m: m == "kl"),
        _panel(reports, "agreement with the original, %", lambda r, m: m in COMPARISONS and r.is_share(m)),
    ]
    return _bars_figure([panel for panel in panels if panel.bars])


def group_bars(report: TaskReport) -> "Figure | None":
    """The first accuracy of every finest group (subject) of a task, coloured by category; None where there is none."""
    metric = report.first_of(share=True)
    if metric is None or not report.groups:
        return None
    bars = []
    for path in report.groups:
        if found := report.measurements.get(path[-1], {}).get(metric):
            category = path[0] if len(path) > 1 else metric
            bars.append(Bar(path[-1], category, 100 * found.value, found.stderr and 100 * found.stderr))
    chance = report.description.get("chance")
    chances = {bar.line: 100 * chance for bar in bars} if chance else {}
    return _bars_figure([Panel(f"{_line(report)}: {metric}, %", tuple(bars), chances)] if bars else [])


def table_image(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> "Figure":
    """A table of cells as an image; columns in ``left`` are aligned to the left, the others are numbers."""
    from matplotlib.figure import Figure

    lines = [header, *rows]
    widths = [2 + max(len(line[column]) for line in lines) for column in range(len(header))]
    size = (CHARACTER_INCHES * sum(widths), LINE_INCHES * len(lines))
    figure = Figure(figsize=size, dpi=120)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, sum(widths)), ylim=(len(lines), 0))
    axes.axis("off")
    for index, line in enumerate(lines):
        if index % 2 == 0:
            axes.axhspan(index, index + 1, color="0.85" if index == 0 else "0.96", linewidth=0)
        start = 0
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            x, side = (start + 1, "left") if column in left else (start + width - 1, "right")
            weight = "bold" if index == 0 else "normal"
            axes.text(x, index + 0.5, cell, ha=side, va="center", family="monospace", fontsize=9, weight=weight)
            start += width
    return figure


def _panel(reports: Sequence[TaskReport], title: str, shown: Callable[[TaskReport, str], bool]) -> Panel:
    """Bars of the metrics that are shown, in percent where the title says so; the infinite have no bar."""
    scale = 100.0 if title.endswith("%") else 1.0
    bars = tuple(
        Bar(_line(report), metric, scale * found.value, found.stderr and scale * found.stderr)
        for report in reports
        for metric, found in report.of_task.items()
        if shown(report, metric) and isfinite(found.value)
    )
    chances = {_line(report): scale * chance for report in reports if (chance := report.description.get("chance"))}
    return Panel(title, bars, chances if title.startswith("accuracy") else {})


def _line(report: TaskReport) -> str:
    return report.name if report.description["partial"] is None else f"{report.name} (partial)"


def _bars_figure(panels: Sequence[Panel]) -> "Figure | None":
    """Panels below each other, each as high as its bars need, in two columns where one would be too high."""
    from matplotlib.figure import Figure

    if not panels:
        return None
    columns = _columns(panels)
    heights = [sum(panel.inches + FRAME_INCHES for panel in column) for column in columns]
    figure = Figure(figsize=(8.0 * len(columns), max(heights)), dpi=120, layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column, height in zip(parts, columns, heights, strict=True):
        # An empty panel fills what the column is shorter than the other: all bars keep their height.
        ratios = [*(panel.inches for panel in column), max(0.01, max(heights) - height)]
        all_axes = part.subplots(len(ratios), 1, gridspec_kw={"height_ratios": ratios})
        all_axes[-1].axis("off")
        for axes, panel in zip(all_axes, column, strict=False):
            _draw(axes, panel)
    return figure


def _columns(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Panels in one column, or in the two whose higher one is the lowest where one would be too high."""
    heights = [panel.inches + FRAME_INCHES for panel in panels]
    if len(panels) == 1 or sum(heights) <= COLUMN_INCHES:
        return [panels]
    cut = min(range(1, len(panels)), key=lambda index: max(sum(heights[:index]), sum(heights[index:])))
    return [panels[:cut], panels[cut:]]


def _draw(axes: "Axes", panel: Panel) -> None:
    """Bars from the top, in inches along the vertical axis."""
    series = list(dict.fromkeys(bar.series for bar in panel.bars))
    top, middles, drawn = 0.0, [], set()
    for line, bars in panel.lines.items():
        height = BAR_INCHES * len(bars)
        for index, bar in enumerate(bars):
            at, color = top + BAR_INCHES * (index + 0.5), f"C{series.index(bar.series) % 10}"
            name = bar.series if bar.series not in drawn else ""
            axes.barh(at, bar.value, BAR_INCHES, color=color, label=name)
            drawn.add(bar.series)
            if bar.stderr is not None and isfinite(bar.stderr):
                axes.errorbar(bar.value, at, xerr=bar.stderr, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
        if (chance := panel.chance.get(line)) is not None:
            name = "chance" if "chance" not in drawn else ""
            around = (top - GAP_INCHES / 2, top + height + GAP_INCHES / 2)
            axes.vlines(chance, *around, color="black", linestyle=":", linewidth=1.2, label=name)
            drawn.add("chance")
        middles.append(top + height / 2)
        top += height + GAP_INCHES
    values = [bar.value for bar in panel.bars]
    if min(values) > 0 and max(values) > 100 * min(values):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.set_yticks(middles, list(panel.lines), fontsize=8)
    axes.set_ylim(top, -GAP_INCHES)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    if len(drawn) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
