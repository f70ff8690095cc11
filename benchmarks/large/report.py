"""What a fit under a limit of memory left behind, and the tables over numbers of blocks."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.lab.tables import Row, grouped, markdown
from benchmarks.large.checkpoint import Shape
from benchmarks.large.floor import Rates, block_floor
from benchmarks.large.limited import GIB

WHOLE = 48  # blocks of Qwen3-30B-A3B


@dataclass(frozen=True)
class Scale:
    """Rows of all runs and what the floor is made of.

    Attributes:
        shape: Of the models.
        num_tokens: Of the calibration set.
        length: Of its sequences.
        rates: Of the machine.
        rows: One for each run.
    """

    shape: Shape
    num_tokens: int
    length: int
    rates: Rates
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def read_scales(paths: Sequence[Path]) -> tuple[str, Scale]:
    """Where the rows of several results come from, and all of them by number of blocks; rates are those of the first.

    Raises:
        ValueError: They are of different shapes or calibration sets.
    """
    found = [json.loads(path.read_text(encoding="utf8")) for path in paths]
    same = [[one[key] for key in ("shape", "num_tokens", "length")] for one in found]
    if any(one != same[0] for one in same):
        raise ValueError(
            f"{[str(path) for path in paths]} have different shapes or calibration sets; report each alone"
        )
    rows = sorted((row for one in found for row in one["rows"]), key=lambda row: row["blocks"])
    rates = Rates(**found[0]["rates"])
    return "; ".join(one["origin"] for one in found), Scale(Shape(**same[0][0]), *same[0][1:], rates, rows)


def read_run(folder: Path) -> Row:
    """What each kind of phase took and was expected to take, and sizes of what was written, from a run folder."""
    with (folder / "memory.csv").open(encoding="utf8", newline="") as file:
        phases = grouped(csv.DictReader(file), lambda row: str(row["phase"]))
    return {
        "phases": {kind: _phase(rows) for kind, rows in phases.items()},
        "export_bytes": size_of(folder / "export"), "blocks_bytes": size_of(folder / "blocks"),
    }  # fmt: skip


def _phase(rows: Sequence[Row]) -> Row:
    """All phases of a kind: seconds in all, bytes of the largest; nothing where nothing was expected."""
    found: Row = {"times": len(rows)}
    for kind in ("measured", "expected"):
        seconds, peaks = ([float(row[f"{what}_{kind}"] or 0) for row in rows] for what in ("seconds", "host"))
        found |= {f"seconds_{kind}": sum(seconds), f"bytes_{kind}": int(max(peaks))}
    return found


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at zero and slope of the line of least squares; points at one place are taken to be proportional."""
    if len({x for x, _ in points}) == 1:
        return 0.0, fmean(y for _, y in points) / points[0][0]
    mean_x, mean_y = (fmean(values) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def scale_report(scale: Scale) -> str:
    """All tables."""
    done = [row for row in scale.rows if not row["code"]]
    failed = [f"{row['blocks']} blocks ended with {row['code']}: {row['error']}" for row in scale.rows if row["code"]]
    parts = ["\n".join(failed)] if failed else []
    if done:
        parts += [memory_table(done), prediction(done), seconds_table(scale, done), expected_table(done)]
    return "\n".join(parts)


def memory_table(rows: Sequence[Row]) -> str:
    """Peaks, and how far they lie from their mean."""
    mean = fmean(row["resident_bytes"] for row in rows)
    limits = {row["limit_bytes"]: f"{(row['limit_bytes'] or 0) / GIB:.1f}" for row in rows} | {None: "none"}
    lines = [
        [
            row["blocks"], f"{row['model_bytes'] / GIB:.2f}", f"{row['resident_bytes'] / GIB:.2f}",
            f"{100 * (row['resident_bytes'] / mean - 1):+.1f}%", f"{row['anonymous_bytes'] / GIB:.2f}",
            f"{row['address_space_bytes'] / GIB:.2f}", limits[row["limit_bytes"]], f"{row['seconds'] / 60:.1f}",
            f"{row['processor_seconds'] / 60:.1f}", f"{row['export_bytes'] / GIB:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = (
        "blocks", "model, GiB", "peak resident, GiB", "of the mean", "of it anonymous", "peak address space", "limit",
        "minutes", "of a processor", "export, GiB",
    )  # fmt: skip
    return markdown(head, lines)


def prediction(rows: Sequence[Row]) -> str:
    """The whole model, on the lines through the runs; nothing where they have one number of blocks."""
    if len({row["blocks"] for row in rows}) < 2:
        return ""
    values = {
        key: line([(row["blocks"], row[key]) for row in rows])
        for key in ("processor_seconds", "resident_bytes", "export_bytes", "blocks_bytes", "model_bytes")
    }
    at = {key: first + WHOLE * each for key, (first, each) in values.items()}
    start, slope = values["processor_seconds"]
    return (
        f"Predicted for {WHOLE} blocks, on the lines through these runs: peak {at['resident_bytes'] / GIB:.2f} GiB, "
        f"{at['processor_seconds'] / 60:.0f} minutes of a processor ({slope:.1f} s per block and {start:.0f} s), "
        f"{at['model_bytes'] / GIB:.0f} GiB read, {at['export_bytes'] / GIB:.1f} GiB export and "
        f"{at['blocks_bytes'] / GIB:.1f} GiB of block files.\n"
    )


def seconds_table(scale: Scale, rows: Sequence[Row]) -> str:
    """Seconds of each kind of phase, divided by the number of blocks, beside the floor."""
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    lines = [[name, *(_per_block(row, name) for row in rows)] for name in names]
    for name, key in (("everything", "seconds"), ("everything, processor seconds", "processor_seconds")):
        lines.append([name, *(f"{row[key] / row['blocks']:.1f}" for row in rows)])
    expected = [sum(phase["seconds_expected"] for phase in row["phases"].values()) / row["blocks"] for row in rows]
    lines.append(["expected by the preflight", *(f"{seconds:.1f}" for seconds in expected)])
    floor = block_floor(scale.shape, rows[0]["block_bytes"], scale.num_tokens, scale.length, scale.rates)
    lines.append(["floor", *(f"{floor.total:.1f}" for _ in rows)])
    read, *products = scale.rates.read / 1e9, scale.rates.model_products / 1e9, scale.rates.float32_products / 1e9
    return markdown(["seconds per block", *(f"{row['blocks']} blocks" for row in rows)], lines) + (
        f"\nFloor of a block: {floor.total:.1f} s = {floor.read:.1f} reading, {floor.forward:.1f} forward (twice), "
        f"{floor.hessians:.1f} Hessians, {floor.solves:.1f} solves; {read:.2f} GB/s from the disk, "
        f"{products[0]:.0f} and {products[1]:.0f} Gop/s of bfloat16 and float32 products; {scale.num_tokens} tokens.\n"
    )


def _per_block(row: Row, name: str) -> str:
    seconds = row["phases"].get(name, {}).get("seconds_measured", 0.0)
    return f"{seconds / row['blocks']:.2f}"


def expected_table(rows: Sequence[Row]) -> str:
    """Measured memory of each kind of phase, as a share of what the preflight expected."""
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    lines = [[name, *(_of_expected(row["phases"].get(name)) for row in rows)] for name in names]
    head = ["peak, GiB: measured / expected", *(f"{row['blocks']} blocks" for row in rows)]
    return markdown(head, lines)


def _of_expected(phase: Row | None) -> str:
    if phase is None:
        return ""
    measured, expected = (phase[f"bytes_{kind}"] for kind in ("measured", "expected"))
    share = f"{expected / GIB:.2f} ({measured / expected - 1:+.0%})" if expected else "-"
    return f"{measured / GIB:.2f} / {share}"
