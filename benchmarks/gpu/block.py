"""One whole block of Qwen3-30B-A3B, streamed from files as a fit does it, and what the model's 48 would take."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.clock import copy_rate, product_rate
from benchmarks.gpu.models import TINY, drawn_model, read_table, run_fit
from benchmarks.gpu.steps import Setting
from benchmarks.lab.tables import Row, grouped
from benchmarks.large.checkpoint import QWEN3_30B_A3B
from benchmarks.large.floor import Rates, block_floor, reading_rate
from moeq.disk.atomic import write_tensors

WHOLE, GOAL = 48, 8 * 60


def blocks(setting: Setting) -> Iterator[Row]:
    """Phases of a fit of two blocks, of which the second is the one that is extrapolated."""
    shape = TINY if setting.quick else QWEN3_30B_A3B
    start = time.perf_counter()
    folder = drawn_model(setting, shape)
    yield {"what": "checkpoint of two blocks", "seconds": time.perf_counter() - start}
    sizes = (4, 32) if setting.quick else (128, 512)
    ids = setting.folder / "block_ids.safetensors"
    write_tensors(ids, {"input_ids": torch.randint(1, 2000, sizes, generator=torch.Generator().manual_seed(0))})
    start = time.perf_counter()
    run = setting.folder / "block_fit"
    shutil.rmtree(run, ignore_errors=True)
    run_fit(str(folder), ids, run, setting.device.type, "--model.placement", "stream", "--data.batch_size", "16")
    whole = time.perf_counter() - start
    table = phases(run / "memory.csv")
    for kind, rows in grouped(table, lambda row: row["phase"]).items():
        yield {
            "what": kind, "times": len(rows), "seconds": sum(row["seconds_measured"] for row in rows),
            "device_gib": max(row["device_measured"] for row in rows) / 2**30,
            "bound_gib": max(row["device_expected"] for row in rows) / 2**30,
            "host_gib": max(row["host_measured"] for row in rows) / 2**30,
        }  # fmt: skip
    second = sum(row["seconds_measured"] for row in table if "block 1" in row["label"])
    size = 64 if setting.quick else 4096
    rates = Rates(
        reading_rate(folder / "block_001.safetensors"),
        product_rate(torch.bfloat16, setting.device, size), product_rate(torch.float32, setting.device, size),
    )  # fmt: skip
    block_bytes = (folder / "block_001.safetensors").stat().st_size
    floor = block_floor(shape, block_bytes, sizes[0] * sizes[1], sizes[1], rates)
    model = WHOLE * second
    yield {
        "what": f"a block, and {WHOLE} of them by extrapolation", "seconds": second, "floor_s": floor.total,
        "floor_share": floor.total / second, "model_s": model, "goal_s": GOAL, "run_s": whole,
        "copy_gb_s": copy_rate(setting.device, 1 << 20 if setting.quick else 1 << 30) / 1e9,
    }  # fmt: skip


def phases(path: Path) -> list[Row]:
    """Phases of a run with their numbers."""
    return [
        {name: value if name in ("phase", "label") else float(value or 0) for name, value in row.items()}
        for row in read_table(path)
    ]
