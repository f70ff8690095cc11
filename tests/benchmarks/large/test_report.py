"""Tables of a scale run: phases without their block, the line through the runs, and what failed."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large.checkpoint import QUICK
from benchmarks.large.floor import Rates
from benchmarks.large.limited import GIB
from benchmarks.large.report import Scale, block_phases, line, memory_table, read_run, scale_report

PHASES = {"calibration data": 1.0, "block 0 mlp_in": 2.0, "block 1 mlp_in": 4.0, "block 1 advance": 3.0, "export": 5.0}


def row(blocks: int, gib: float, **more: Any) -> dict[str, Any]:
    memory = [
        {"label": "block 0 mlp_in", "expected": 100, "measured": 90},
        {"label": "block 1 mlp_in", "expected": 100, "measured": 120},
    ]
    return {
        "blocks": blocks, "limit_bytes": 8 * GIB, "code": 0, "seconds": 10 + 30 * blocks,
        "processor_seconds": 40 * blocks, "model_bytes": blocks * GIB,
        "block_bytes": GIB, "resident_bytes": int(gib * GIB), "anonymous_bytes": GIB, "address_space_bytes": 5 * GIB,
        "phases": PHASES, "memory": memory, "export_bytes": blocks * GIB, "blocks_bytes": blocks * GIB, **more,
    }  # fmt: skip


def scale(*rows: dict[str, Any]) -> Scale:
    return Scale(QUICK, 4096, 512, Rates(1e9, 1e12, 1e11), list(rows))


def test_phases_are_summed_over_blocks() -> None:
    assert block_phases(PHASES) == ({"mlp_in": 6.0, "advance": 3.0}, {"calibration data": 1.0, "export": 5.0})


def test_the_line_goes_through_its_points() -> None:
    assert line([(4, 22.0), (8, 42.0), (16, 82.0)]) == pytest.approx((2.0, 5.0))
    assert line([(4, 20.0)]) == (0.0, 5.0)


def test_peaks_stand_beside_their_mean() -> None:
    table = memory_table([row(4, 3.8), row(8, 4.2)])
    assert "| 4 | 4.00 | 3.80 | -5.0% |" in table
    assert "| 8 | 8.00 | 4.20 | +5.0% |" in table


def test_the_report_predicts_the_whole_model_and_compares_with_what_was_expected() -> None:
    text = scale_report(scale(row(4, 4), row(8, 4)))
    assert "48 blocks, on the lines through these runs: peak 4.00 GiB, 24 minutes (30.0 s per block and 10 s)" in text
    assert "| 4 | 0.90 (block 0 mlp_in) | 1.20 (block 1 mlp_in) | 1.20 (block 1 mlp_in) |" in text
    assert "Floor of a block: " in text


def test_a_run_that_failed_is_said_to_have() -> None:
    failed = {"blocks": 16, "code": 1, "error": "MemoryError", "limit_bytes": GIB, "seconds": 1.0}
    assert scale_report(scale(failed)) == "16 blocks ended with 1: MemoryError"
    assert "16 blocks ended" in scale_report(scale(row(4, 4), failed))


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"seconds": PHASES}))
    (tmp_path / "memory.csv").write_text("label,model,expected,measured\nblock 0 mlp_in,1,10,9\n")
    for name in ("export", "blocks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(7))
    assert read_run(tmp_path) == {
        "phases": PHASES, "memory": [{"label": "block 0 mlp_in", "expected": 10, "measured": 9}],
        "export_bytes": 7, "blocks_bytes": 7,
    }  # fmt: skip
