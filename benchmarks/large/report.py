"""What a fit under a limit of memory left behind, and the tables over numbers of blocks."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.lab.tables import Row, markdown
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


def read_run(folder: Path) -> Row:
    """Seconds by phase, expected and measured memory, and sizes of what was written, from a run folder."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf8"))
    with (folder / "memory.csv").open(encoding="utf8", newline="") as file:
        memory = [
            {"label": row["label"], "expected": int(row["expected"]), "measured": int(row["measured"])}
            for row in csv.DictReader(file)
        ]
    return {
        "phases": manifest["seconds"], "memory": memory,
        "export_bytes": size_of(folder / "export"), "blocks_bytes": size_of(folder / "blocks"),
    }  # fmt: skip


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def block_phases(seconds: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each phase over all blocks, without the number of the block, and of what belongs to no block."""
    of_blocks: dict[str, float] = {}
    rest: dict[str, float] = {}
    for label, value in seconds.items():
        found = re.fullmatch(r"block \d+ (.+)", label)
        target, name = (of_blocks, found[1]) if found else (rest, label)
        target[name] = target.get(name, 0.0) + value
    return of_blocks, rest


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Value at zero and slope of the line of least squares; one point is taken to be proportional."""
    if len(points) == 1:
        return 0.0, points[0][1] / points[0][0]
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
            f"{row['export_bytes'] / GIB:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = (
        "blocks", "model, GiB", "peak resident, GiB", "of the mean", "of it anonymous", "peak address space", "limit",
        "minutes", "export, GiB",
    )  # fmt: skip
    return markdown(head, lines)


def prediction(rows: Sequence[Row]) -> str:
    """The whole model, on the lines through the runs."""
    values = {
        key: line([(row["blocks"], row[key]) for row in rows])
        for key in ("seconds", "resident_bytes", "export_bytes", "blocks_bytes", "model_bytes")
    }
    at = {key: start + WHOLE * slope for key, (start, slope) in values.items()}
    return (
        f"Predicted for {WHOLE} blocks, on the lines through these runs: peak {at['resident_bytes'] / GIB:.2f} GiB, "
        f"{at['seconds'] / 60:.0f} minutes ({values['seconds'][1]:.1f} s per block and {values['seconds'][0]:.0f} s), "
        f"{at['model_bytes'] / GIB:.0f} GiB read, {at['export_bytes'] / GIB:.1f} GiB export and "
        f"{at['blocks_bytes'] / GIB:.1f} GiB of block files.\n"
    )


def seconds_table(scale: Scale, rows: Sequence[Row]) -> str:
    """Seconds per block of each phase, beside the floor."""
    phases = {row["blocks"]: block_phases(row["phases"]) for row in rows}
    names = list(dict.fromkeys(name for of_blocks, _ in phases.values() for name in of_blocks))
    whole = list(dict.fromkeys(name for _, rest in phases.values() for name in rest))
    lines = [[name, *(f"{found[0].get(name, 0.0) / num:.2f}" for num, found in phases.items())] for name in names]
    lines.append(["all phases of a block", *(f"{sum(found[0].values()) / num:.1f}" for num, found in phases.items())])
    lines += [
        [f"{name} (of the run, divided)", *(f"{found[1].get(name, 0.0) / num:.2f}" for num, found in phases.items())]
        for name in whole
    ]
    for name, key in (("everything", "seconds"), ("everything, processor seconds", "processor_seconds")):
        lines.append([f"{name}, divided", *(f"{row[key] / row['blocks']:.1f}" for row in rows)])
    floor = block_floor(scale.shape, rows[0]["block_bytes"], scale.num_tokens, scale.length, scale.rates)
    read, *products = scale.rates.read / 1e9, scale.rates.model_products / 1e9, scale.rates.float32_products / 1e9
    return markdown(["seconds per block", *(f"{num} blocks" for num in phases)], lines) + (
        f"\nFloor of a block: {floor.total:.1f} s = {floor.read:.1f} reading, {floor.forward:.1f} forward (twice), "
        f"{floor.hessians:.1f} Hessians, {floor.solves:.1f} solves; {read:.2f} GB/s from the disk, "
        f"{products[0]:.0f} and {products[1]:.0f} Gop/s of bfloat16 and float32 products; {scale.num_tokens} tokens.\n"
    )


def expected_table(rows: Sequence[Row]) -> str:
    """Largest and smallest ratio of measured to expected memory over the passes of a run."""
    lines = []
    for row in rows:
        ratios = {one["label"]: one["measured"] / one["expected"] for one in row["memory"] if one["expected"]}
        peak = max(row["memory"], key=lambda one: one["measured"])
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        cells = [f"{ratios[label]:.2f} ({label})" for label in (low, high)]
        lines.append([row["blocks"], *cells, f"{peak['measured'] / peak['expected']:.2f} ({peak['label']})"])
    return markdown(("blocks", "measured / expected, least", "most", "of the largest phase"), lines)
