import json
from pathlib import Path

import pytest
import torch

from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import Choice, uniform_plan
from moeq.allocation.time_table import plan_milliseconds, read_times, this_machine
from moeq.checkpoint.packed_weight import dequantize_codes
from moeq.quant.spec import GridSpec
from moeq.timing import measure
from moeq.timing.__main__ import main
from moeq.timing.measure import least_seconds, measure_times, packed_copies
from moeq.timing.shapes import model_shapes
from moeq.timing.summary import summary
from tests.allocation.toy import toy_costs, toy_weights
from tests.tiny import save_tiny

WEIGHTS = toy_weights()
GRID = GridSpec(4, 32)


@pytest.mark.parametrize("label", ["2g32", "3g32", "4g32", "8g32", "q4_k"])
def test_what_is_timed_is_the_product_with_a_quantized_weight_as_a_packed_model_has_it(label: str) -> None:
    grid = Choice.from_label(label).grid(GRID)
    first, *others = packed_copies((64, 256), grid, 3, torch.bfloat16, room=False)
    assert len(others) == 2
    assert (first.form is None) == grid.is_named  # K-quants are multiplied by the reference
    x_MI = torch.randn(2, 256).bfloat16()
    expected_MO = x_MI.float() @ dequantize_codes(first.quantized()).float().mT
    for layer in (first, *others):
        torch.testing.assert_close(layer(x_MI).float(), expected_MO, rtol=0.02, atol=0.02)


def test_copies_span_no_more_memory_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SPAN", 5 * 64 * 64 * 5 // 8)  # each takes 4 bits a weight, and scales
    assert 3 <= len(packed_copies((64, 64), GRID, 100, torch.bfloat16, room=False)) <= 5
    assert len(packed_copies((64, 64), GRID, 2, torch.bfloat16, room=False)) == 2


def test_the_least_time_of_turns_is_kept_and_the_first_turn_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    durations = {"a": iter([1, 5, 3, 4]), "b": iter([9, 8, 7, 9])}
    monkeypatch.setattr(measure, "process_time", lambda: now[0])
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])

    def work(name: str) -> None:
        order.append(name)
        now[0] += next(durations[name])

    assert least_seconds({"a": lambda: work("a"), "b": lambda: work("b")}, 3) == {"a": 3, "b": 7}
    assert "".join(order) == "abababab"


def test_a_table_has_every_shape_and_choice_that_fit_each_other() -> None:
    choices = [Choice(3, 32), Choice(4, 64), Choice.from_label("q4_k")]
    table = measure_times(WEIGHTS, choices, GRID, rows=(1, 4), turns=1)
    shapes = {(64, 64), (32, 64), (64, 32)}
    fitting = {("3g32", *shape) for shape in shapes} | {("4g64", 64, 64), ("4g64", 32, 64)}
    assert table.seconds.keys() == {(*key, rows) for key in fitting for rows in (1, 4)}
    assert all(0 < seconds < 10 for seconds in table.seconds.values())
    assert table.machine == this_machine(torch.bfloat16)
    assert not table.symmetric


def test_the_summary_says_what_a_uniform_plan_takes() -> None:
    table = measure_times(WEIGHTS, [Choice(4, 32), Choice(4, 64)], GRID, turns=1)
    total = plan_milliseconds(uniform_plan(WEIGHTS, GRID), WEIGHTS, table)
    *lines, last = summary(table, WEIGHTS).splitlines()
    assert len(lines) == 4
    assert last.split()[-2:] == ["-", f"{total:.3f}"]  # groups of 64, which do not divide rows of 32, come first


def test_the_command_writes_a_table_by_which_a_plan_keeps_a_budget_of_milliseconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model", tmp_path / "times.json"
    save_tiny("qwen3_moe", model)
    options = ["--choices", "2", "4", "8", "--group-size", "16", "--turns", "1", "--quiet", "--output", str(output)]
    assert main(["--model", str(model), *options]) == 0
    assert "milliseconds of a token" in capsys.readouterr().out
    weights, choices = model_shapes(str(model)), [Choice(bits, 16) for bits in (2, 4, 8)]
    table = read_times(output)
    assert json.loads(output.read_text())["machine"]["dtype"] == "bfloat16"
    each = [plan_milliseconds({w.name: c.grid(GRID) for w in weights}, weights, table) for c in choices]
    budget = (min(each) + max(each)) / 2
    spec = AllocationSpec(
        method="allocate", cost="fisher", budget=budget, budget_unit="milliseconds", times=str(output),
        choices=("2g16", "4g16", "8g16"),
    )  # fmt: skip
    costs = toy_costs(weights, choices=choices)
    plan = decide(spec, weights, GRID, Evidence(costs={"fisher": costs})).plan
    assert plan_milliseconds(plan, weights, table) <= budget + 1e-4


def test_a_command_that_cannot_measure_says_why_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "times.json"
    assert main(["--model", str(tmp_path / "empty"), "--output", str(output), "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--model", str(tmp_path), "--choices", "many", "--output", str(output), "--quiet"]) == 1
    assert "choice ('many') must be bits" in capsys.readouterr().err
    assert not output.exists()
