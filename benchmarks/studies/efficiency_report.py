"""Tables and the figure of the study of efficiency: each plan as a point of bytes, time and divergence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl

LINE = 1.24  # of heights of labels, on a logarithmic axis
TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SAME = 1e-4  # nats: the model itself, which a logarithmic axis has no place for
_MEMORY = (
    "Bytes over those of the file, in a process of its own: tensors of the model; what is resident after opening and a "
    "few tokens; the most in between, pages of the file included; each without what the process had before."
)
_MLX = (
    "A check that the files run, no more: its kernels for quantized weights are made for GPUs. Seconds are of all "
    "threads; what is not quantized is in float32 on both sides, as MLX multiplies experts on a CPU in no other dtype."
)
_OF_ONE_SEED = ("packed", "files", "memory", "mlx")
_SIDES = {
    "moeq": ("tensors / file", "resident / file", "peak / file"),
    "llama.cpp": ("resident / file", "peak / file"),
}
ENERGY = "Energy: no counter (`/sys/class/powercap`) on this machine."


def report(rows: Sequence[Row]) -> str:
    """Markdown of the parts that were measured."""
    parts = {part: {row["plan"]: row for row in rows if row["part"] == part} for part in _OF_ONE_SEED}
    tables = ["## Size and quality", "", _quality_table(rows)]
    if parts["packed"]:
        tables += ["## In moeq's packed path", "", _speed_table(parts["packed"]), _energy(parts["packed"])]
    if parts["files"]:
        experts = next(iter(parts["files"].values()))["experts"]
        tables += ["", "## In llama.cpp", "", f"Files have {experts} experts a block.", ""]
        tables += [_speed_table(parts["files"]), _refused(parts["files"])]
        tables += ["", "## Opening the files", "", _opening_table(parts["files"])]
    if parts["memory"]:
        experts = next(iter(parts["memory"].values())).get("experts")
        tables += ["", "## Memory", "", f"Files have {experts} experts a block. {_MEMORY}", ""]
        tables += [_memory_table(parts["memory"]), _refused(parts["memory"])]
    if parts["mlx"]:
        experts = next(iter(parts["mlx"].values()))["experts"]
        tables += ["", "## In mlx-lm, on the CPU", "", f"Files have {experts} experts a block. {_MLX}", ""]
        tables += [_speed_table(parts["mlx"], "float32"), _refused(parts["mlx"], "MLX")]
    return "\n".join(tables)


def _by_plan(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of quality, one for each seed."""
    return grouped((row for row in rows if row["part"] == "quality"), lambda row: str(row["plan"]))


def _quality_table(rows: Sequence[Row]) -> str:
    head = ["plan", "bits", "mean KL", "bits, real shapes", "2 / 3 / 4 / 8 bits, weights", "predicted ms of products"]
    lines = []
    for plan, seeds in _by_plan(rows).items():
        row, kl = seeds[0], cell([mean_kl(each) for each in seeds], ".4f")
        given = list(row["choices"].values())
        widths = " / ".join(str(given.count(bits)) for bits in (2, 3, 4, 8)) if given else "-"
        predicted = f"{row['milliseconds']:.1f}" if "milliseconds" in row else "-"
        lines.append([plan, f"{row['bits']:.2f}", kl, f"{row['large_bits']:.2f}", widths, predicted])
    return markdown(head, lines)


def faster(row: Row, task: str) -> float:
    """How many times as fast as bfloat16, the median over turns."""
    sides = row["seconds"][task]
    mine = sides.get("plan", sides["bfloat16"])
    return median(dense / own for dense, own in zip(sides["bfloat16"], mine, strict=True))


def rate(row: Row, task: str) -> float:
    """Tokens per second, from the median turn."""
    sides = row["seconds"][task]
    num = row["prompt"] if task == "prompt" else int(task.split()[1])
    return float(num / median(sides.get("plan", sides["bfloat16"])))


def _speed_table(found: Mapping[str, Row], dense: str = "bfloat16") -> str:
    first = next((row for row in found.values() if "seconds" in row), None)
    if first is None:  # all plans are refused
        return ""
    names = [f"{task} {first['prompt']}" if task == "prompt" else task for task in first["seconds"]]
    head = ["plan", "MiB", *(title for name in names for title in (f"{name}: tokens/s", f"times {dense}"))]
    with_types, lines = any("types" in row for row in found.values()), []
    for plan, row in found.items():
        if "seconds" in row:
            num_bytes = _num_bytes(row)
            pairs = ((f"{rate(row, task):.1f}", f"{faster(row, task):.2f}") for task in row["seconds"])
            cells = [figure for pair in pairs for figure in pair]
            label = dense if plan == "bfloat16" else plan
            lines.append([label, f"{num_bytes / 2**20:.0f}", *cells, *([_types(row) or "-"] if with_types else [])])
    return markdown([*head, *(["types, weights"] if with_types else [])], lines)


def _num_bytes(row: Row) -> int:
    """Of a plan's file, or of the model where none is written."""
    if "gguf_bytes" in row:
        return int(row["gguf_bytes"])
    found = row["bytes"]
    return int(found.get("plan", found["bfloat16"]) if isinstance(found, Mapping) else found)


def _types(row: Row) -> str:
    """Weights of a file by type, without those that are not quantized."""
    return ", ".join(f"{num} {kind}" for kind, num in row.get("types", {}).items() if kind not in ("F32", "BF16"))


def _refused(found: Mapping[str, Row], form: str = "GGUF") -> str:
    names = [plan for plan, row in found.items() if "refused" in row]
    if not names:
        return ""
    reason = next(row["refused"] for row in found.values() if "refused" in row)
    return f"Refused in {form}: {', '.join(names)}; such as: {reason}."


def _energy(found: Mapping[str, Row]) -> str:
    used = {plan: row["joules"] for plan, row in found.items() if row.get("joules") is not None}
    return f"Joules of both sides together: {used}." if used else ENERGY


def _opening_table(found: Mapping[str, Row]) -> str:
    head = ["plan", "moeq: s", "llama.cpp: s"]
    lines = []
    for plan, row in found.items():
        theirs = row.get("llama.cpp")
        lines.append([plan, f"{row['moeq']['seconds']:.1f}", "-" if theirs is None else f"{theirs['seconds']:.1f}"])
    return markdown(head, lines)


def _memory_table(found: Mapping[str, Row]) -> str:
    head = ["plan"]
    for side, others in _SIDES.items():
        head += [f"{side}: file, MiB", *others]
    lines = []
    for plan, row in found.items():
        cells: list[str] = [plan]
        for side, others in _SIDES.items():
            taken = row.get(side)
            if taken is None:
                cells += ["-"] * (1 + len(others))
                continue
            cells += [f"{taken['file'] / 2**20:.0f}"]
            cells += [f"{taken[name.partition(' ')[0]] / taken['file']:.2f}" for name in others]
        lines.append(cells)
    return markdown(head, lines)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other one beats in both numbers, by the first."""
    best: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if not best or y < points[best[-1]][1]:
            best.append(name)
    return best


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time of a token and bytes, each against KL, with the plans that no other beats in both joined by a line."""
    from matplotlib.figure import Figure

    kl = {plan: fmean(mean_kl(row) for row in seeds) for plan, seeds in _by_plan(rows).items()}
    packed = {row["plan"]: row for row in rows if row["part"] == "packed"}
    llama = {row["plan"]: row for row in rows if row["part"] == "files" and "seconds" in row}
    if not packed:
        return
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    series = {
        who: {plan: (1 / faster(row, "decode 1"), kl[plan]) for plan, row in found.items() if kl.get(plan, 0) > SAME}
        for who, found in (("moeq", packed), ("llama.cpp", llama))
    }
    # Labels of one to the right, of the other to the left: both have points at the same heights.
    for (name, points), marker, place in zip(series.items(), "os", (1.04, 0.96), strict=True):
        _scatter(left, points, name, marker, place)
    if times := [x for points in series.values() for x, _ in points.values()]:
        ticks = [time for time in TICKS if min(times) / 3 < time < 2 * max(times)]
        left.set_xscale("log")
        left.set_xlim(min(times) / 4, max(times) * 2.2)
        left.set_xticks(ticks, [f"{time:g}" for time in ticks])
        left.minorticks_off()
    sizes = {plan: (seeds[0]["bits"], kl[plan]) for plan, seeds in _by_plan(rows).items() if seeds[0]["bits"] < 16}
    _scatter(right, sizes, "all plans", "o", 1.06)
    right.set_xlim(2, 9.6)
    left.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="time of a token, one sequence (bfloat16 = 1)", ylabel="mean KL, nats", yscale="log")
    right.set(xlabel="bits per weight, scales included", ylabel="mean KL, nats", yscale="log")
    figure.savefig(path, dpi=100)


def _scatter(axes: Any, points: Mapping[str, tuple[float, float]], label: str, marker: str, place: float) -> None:
    """Points with their front and names, these at ``place`` times the abscissa: to the right above 1, else left."""
    if not points:
        return
    names = front(points)
    (line,) = axes.plot(*zip(*(points[name] for name in names), strict=True), "-", alpha=0.5, label=f"{label}: front")
    axes.scatter(*zip(*points.values(), strict=True), marker=marker, s=28, color=line.get_color(), label=label)
    for name, height in zip(sorted(points, key=lambda name: points[name][1]), _label_heights(points), strict=True):
        x, y = points[name]
        style = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkA": 0}
        side = "left" if place > 1 else "right"
        axes.annotate(name, (x, y), xytext=(x * place, height), ha=side, va="center", fontsize=7, arrowprops=style)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _label_heights(points: Mapping[str, tuple[float, float]]) -> list[float]:
    """Heights of labels, from the lowest point up, so far apart that none covers another."""
    heights: list[float] = []
    for _, y in sorted(points.values(), key=lambda point: point[1]):
        heights.append(y if not heights else max(y, heights[-1] * LINE))
    return heights
