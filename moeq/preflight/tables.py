"""Forecasts as text of at most 100 columns, as plain values, and beside what was measured."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from moeq.preflight.meter import Measured
from moeq.preflight.phases import Forecast, Row

WIDTH = 100


def size(num_bytes: float) -> str:
    """Such as "1.2 GB", "340 MB", "12 kB"; powers of ten, as disks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{1 if num_bytes < 100 * factor and unit != 'MB' else 0}f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """About how long, with two digits at most: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def summary_line(forecast: Forecast) -> str:
    """The whole run in one line."""
    total = forecast.total()
    device = "" if forecast.on_cpu else f"{size(total.device)} of the device, "
    time = "" if total.seconds is None else f", about {duration(total.seconds)}"
    return f"Preflight: {device}{size(total.host)} of main memory at most, {size(total.disk)} on disk{time}"


def forecast_table(forecast: Forecast) -> str:
    """Markdown: what will happen, a row for each kind of phase, and of what its largest moment consists."""
    total, rows = forecast.total(), forecast.rows()
    devices = [] if forecast.on_cpu else ["device"]
    head = ["phase", "times", *devices, "host", "disk", "time"]
    body = [_cells(row, forecast.on_cpu) for row in rows]
    body.append([*(f"**{cell}**" if cell else "" for cell in _cells(total, forecast.on_cpu))])
    lines = [line for sentence in forecast.lines for line in wrap(sentence, WIDTH)]
    worst = sorted(total.parts.items(), key=lambda item: -item[1])
    held = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in worst if num_bytes >= 1e6)
    process = f", and the process itself {size(forecast.process)}" if forecast.on_cpu else ""
    largest = wrap(f"At the largest moment: {held or 'less than 1 MB'}{process}.", WIDTH)
    return "\n".join([*lines, "", *_markdown(head, body), "", *largest, ""])


def comparison_table(forecast: Forecast, measured: Sequence[Measured]) -> str:
    """Markdown: for each kind of phase what was expected, and beside it what it took."""
    expected = {row.kind: row for row in forecast.rows()}
    head = ["phase", "times", "host" if forecast.on_cpu else "device", "took", "disk", "took", "time", "took"]
    body = []
    for kind in dict.fromkeys(each.kind for each in measured):
        found = [each for each in measured if each.kind == kind]
        row = expected.get(kind)
        peak = max(each.host if forecast.on_cpu else each.device for each in found)
        disk, seconds = sum(each.disk for each in found), sum(each.seconds for each in found)
        asked = ["", "", ""]
        if row is not None:
            asked = [size(row.host if forecast.on_cpu else row.device), size(row.disk), _time(row.seconds)]
        body.append([kind, str(len(found)), asked[0], size(peak), asked[1], size(disk), asked[2], _time(seconds)])
    return "\n".join(_markdown(head, body))


def memory_rows(forecast: Forecast | None, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row for each measured phase, in bytes and seconds; expected columns are empty where nothing was expected."""
    expected = {} if forecast is None else {(phase.kind, phase.label): phase for phase in forecast.phases}
    rows = []
    for each in measured:
        phase = expected.get((each.kind, each.label))
        asked: dict[str, Any] = dict.fromkeys(("host", "device", "disk", "seconds"), "")
        if forecast is not None and phase is not None:
            asked = {"host": forecast.host_bytes(phase), "device": forecast.device_bytes(phase), "disk": phase.disk}
            asked["seconds"] = "" if phase.seconds is None else phase.seconds
        rows.append(
            {
                "phase": each.kind, "label": each.label,
                "host_expected": asked["host"], "host_measured": each.host,
                "device_expected": asked["device"], "device_measured": each.device,
                "disk_expected": asked["disk"], "disk_measured": each.disk,
                "seconds_expected": asked["seconds"], "seconds_measured": each.seconds,
            }
        )  # fmt: skip
    return rows


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """Everything that is known, as plain values."""
    return {
        "lines": list(forecast.lines),
        "process_bytes": forecast.process,
        "on_cpu": forecast.on_cpu,
        "total": vars(forecast.total()) | {"parts": dict(forecast.total().parts)},
        "phases": [
            {
                "kind": phase.kind, "label": phase.label, "device": forecast.device_bytes(phase),
                "host": forecast.host_bytes(phase), "disk": phase.disk, "seconds": phase.seconds,
                "moments": [{"device": dict(m.device), "host": dict(m.host)} for m in phase.moments],
            }
            for phase in forecast.phases
        ],
    }  # fmt: skip


def _cells(row: Row, on_cpu: bool) -> list[str]:
    device = [] if on_cpu else [size(row.device)]
    return [row.kind, str(row.count), *device, size(row.host), size(row.disk) if row.disk else "", _time(row.seconds)]


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns are aligned as text, too: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (head, rule, *body):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
