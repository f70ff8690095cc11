"""Steps end in their time, and what they found is on the disk whatever becomes of them."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.steps import Setting, Step, run_steps
from benchmarks.lab.tables import Row


def endless(_: Setting) -> Iterator[Row]:
    yield {"what": "first"}
    while True:
        time.sleep(0.01)


def broken(_: Setting) -> Iterator[Row]:
    yield {"what": "before", "right": True}
    raise ValueError("no such card")


def test_a_step_that_does_not_end_or_fails_leaves_its_rows_and_time_for_the_others(tmp_path: Path) -> None:
    setting, path = Setting(torch.device("cpu"), True, tmp_path), tmp_path / "rows.json"
    seen = []

    def last(_: Setting) -> Iterator[Row]:
        seen.extend(json.loads(path.read_text())["rows"])
        yield {"what": "last"}

    steps = [Step("endless", 1.5, endless), Step("broken", 9, broken), Step("last", 9, last)]
    rows = run_steps(steps, setting, 60, path, "here", time.perf_counter())
    assert [row["what"] for row in rows] == ["first", "stopped", "before", "failed", "last"]
    assert rows[3]["note"] == "ValueError: no such card"
    assert rows[3]["right"] is False
    assert len(seen) == 4
    assert "## broken" in path.with_suffix(".md").read_text()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_steps_for_which_no_time_is_left_are_said_to_be_left_out(tmp_path: Path) -> None:
    setting = Setting(torch.device("cpu"), True, tmp_path)
    rows = run_steps([Step("late", 9, endless)], setting, 5, tmp_path / "x.json", "here", time.perf_counter() - 4.5)
    assert [row["what"] for row in rows] == ["not begun"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_a_rehearsal_without_a_gpu_runs_every_step_and_finds_it_right(tmp_path: Path) -> None:
    main(["--quick", "--device", "cpu", "--folder", str(tmp_path / "gpu")])
    rows = json.loads((tmp_path / "gpu/gpu.json").read_text())["rows"]
    steps = {"numbers", "fit", "packed models", "validate", "solve", "block", "products", "EBSS", "tiles"}
    assert {row["step"] for row in rows} == steps
    assert not [row for row in rows if row.get("right") is False or "note" in row]
    assert sum(row.get("right", False) for row in rows) >= 12


@pytest.mark.gpu
@pytest.mark.slow
def test_every_path_of_a_gpu_is_right(tmp_path: Path) -> None:
    main(
        ["--quick", "--folder", str(tmp_path / "gpu"), "--steps", "numbers", "fit", "packed_models", "validate", "EBSS"]
    )
