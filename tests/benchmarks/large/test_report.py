"""Tables of a scale run: phases without their block, the line through the runs, and what failed."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large.checkpoint import QUICK
from benchmarks.large.floor import Rates
from benchmarks.large.limited import GIB
from benchmarks.large.report import Scale, line, memory_table, read_run, read_scales, scale_report

PHASES = {
    "calibrate mlp_in": {
        "times": 4, "seconds_measured": 8.0, "seconds_expected": 6.0,
        "bytes_measured": 3 * GIB, "bytes_expected": 4 * GIB
    },
    "figures": {
        "times": 1, "seconds_measured": 2.0, "seconds_expected": 0.0, "bytes_measured": GIB, "bytes_expected": 0
    },
}  # fmt: skip


def row(blocks: int, gib: float, **more: Any) -> dict[str, Any]:
    return {
        "blocks": blocks, "limit_bytes": 8 * GIB, "code": 0, "seconds": 10 + 30 * blocks,
        "processor_seconds": 40 * blocks, "model_bytes": blocks * GIB,
        "block_bytes": GIB, "resident_bytes": int(gib * GIB), "anonymous_bytes": GIB, "address_space_bytes": 5 * GIB,
        "phases": PHASES, "export_bytes": blocks * GIB, "blocks_bytes": blocks * GIB, **more,
    }  # fmt: skip


def scale(*rows: dict[str, Any]) -> Scale:
    return Scale(QUICK, 4096, 512, Rates(1e9, 1e12, 1e11), list(rows))


def test_the_line_goes_through_its_points() -> None:
    assert line([(4, 22.0), (8, 42.0), (16, 82.0)]) == pytest.approx((2.0, 5.0))
    assert line([(4, 20.0)]) == (0.0, 5.0)


def test_peaks_stand_beside_their_mean() -> None:
    table = memory_table([row(4, 3.8), row(8, 4.2)])
    assert "| 4 | 4.00 | 3.80 | -5.0% |" in table
    assert "| 8 | 8.00 | 4.20 | +5.0% |" in table


def test_the_report_predicts_the_whole_model_and_compares_with_what_was_expected() -> None:
    text = scale_report(scale(row(4, 4), row(8, 4)))
    assert "48 blocks, on the lines through these runs: peak 4.00 GiB, 32 minutes of a processor (40.0 s per" in text
    assert "| calibrate mlp_in | 2.00 | 1.00 |" in text
    assert "| expected by the preflight | 1.5 | 0.8 |" in text
    assert "| calibrate mlp_in | 3.00 / 4.00 (-25%) | 3.00 / 4.00 (-25%) |" in text
    assert "| figures | 1.00 / - | 1.00 / - |" in text
    assert "Floor of a block: " in text


def test_a_run_that_failed_is_said_to_have() -> None:
    failed = {"blocks": 16, "code": 1, "error": "MemoryError", "limit_bytes": GIB, "seconds": 1.0}
    assert scale_report(scale(failed)) == "16 blocks ended with 1: MemoryError"
    assert "16 blocks ended" in scale_report(scale(row(4, 4), failed))


def test_results_of_several_calls_are_one_report(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in "ab"]
    for path, one in zip(paths, (scale(row(16, 4)), scale(row(4, 4), row(8, 4))), strict=True):
        path.write_text(json.dumps({"origin": path.stem, **one.as_json()}))
    origin, joined = read_scales(paths)
    assert origin == "a; b"
    assert joined == scale(row(4, 4), row(8, 4), row(16, 4))
    paths[1].write_text(json.dumps({"origin": "c", **scale().as_json(), "length": 256}))
    with pytest.raises(ValueError, match="different shapes"):
        read_scales(paths)


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    rows = [
        "phase,label,host_expected,host_measured,seconds_expected,seconds_measured",
        "solve,block 0 mlp_in solve,10,9,1.5,2.5", "solve,block 1 mlp_in solve,12,8,1.5,3.5", "figures,,,7,,1",
    ]  # fmt: skip
    (tmp_path / "memory.csv").write_text("\n".join(rows))
    for name in ("export", "blocks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(7))
    found = read_run(tmp_path)
    assert found["phases"]["solve"] == {
        "times": 2, "seconds_measured": 6.0, "seconds_expected": 3.0, "bytes_measured": 9, "bytes_expected": 12
    }  # fmt: skip
    assert found["phases"]["figures"]["bytes_expected"] == 0
    assert found["export_bytes"] == found["blocks_bytes"] == 7
