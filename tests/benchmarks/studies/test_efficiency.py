"""Plans of the study of efficiency, how they are carried to another model, and what its report makes of times."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed.plan_speed import joules
from benchmarks.studies import efficiency_plans as plans
from benchmarks.studies.efficiency import EVERY, PARTS, Case, Efficiency
from benchmarks.studies.efficiency_report import faster, front, rate, report
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import Evidence
from moeq.allocation.plan import plan_cost
from moeq.allocation.problem import build_problem
from moeq.allocation.time_table import TimeTable, this_machine
from tests.allocation.toy import toy_costs, toy_weights

SMALL = plans.shapes_of(plans.config_of(num_experts=32, hidden_size=64, num_hidden_layers=2))
BUNDLED = toy_weights(num_blocks=4, num_experts=16, hidden=64, inner=64)


def test_the_model_of_real_shapes_has_those_of_deepseek_moe() -> None:
    weights = plans.shapes_of(plans.config_of())
    shapes = {(w.kind, w.linear): (w.out_features, w.in_features) for w in weights}
    assert shapes["routed", "up_proj"] == (1408, 2048)
    assert shapes["shared", "down_proj"] == (2048, 2816)
    assert {w.active_share for w in weights if w.kind == "routed"} == {6 / 64}


def test_a_plan_is_carried_block_by_block_and_its_experts_repeat() -> None:
    plan = {w.name: replace(plans.GRID, bits=(2, 3, 4, 8)[(w.block + (w.expert or 0)) % 4]) for w in BUNDLED}
    found = plans.carried(plan, SMALL)
    assert found.keys() == {w.name for w in SMALL}
    for weight in SMALL:
        assert found[weight.name].bits == (2, 3, 4, 8)[(2 * weight.block + (weight.expert or 0) % 16) % 4]
    assert plans.carried({}, SMALL) == {}
    assert plans.from_labels(plans.labels(plan)) == plan


def test_the_combination_raises_the_busiest_experts_until_the_size_is_reached() -> None:
    tokens = {f"model.layers.{b}.mlp.experts": torch.arange(16) + 100 * (b == 2) for b in range(4)}
    plan = plans.busy_experts(BUNDLED, Evidence(tokens=tokens), 3.25)
    wide = {(w.block, w.expert) for w in BUNDLED if w.expert is not None and plan[w.name].bits == 4}
    assert {plan[w.name].bits for w in BUNDLED if w.expert is None} == {4}
    assert {(2, e) for e in range(16)} <= wide
    assert wide <= {(2, e) for e in range(16)} | {(b, e) for b in (0, 1, 3) for e in range(4, 16)}
    used = plan_cost(plan, BUNDLED).average_bits
    one_expert = 2 * 3 * 64 * 64 / sum(w.numel for w in BUNDLED)
    assert 3.25 - one_expert < used <= 3.25


def test_times_of_a_plan_are_those_of_the_weights_that_it_is_carried_to() -> None:
    large = plans.shapes_of(plans.config_of(num_experts=32, hidden_size=64, num_hidden_layers=4))
    seconds = {
        (c.label, w.out_features, w.in_features, 1): 1e-9 * c.bits * w.numel for w in large for c in plans.CHOICES
    }
    times = TimeTable(this_machine(torch.bfloat16), True, False, seconds)
    costs = toy_costs(BUNDLED, choices=list(plans.CHOICES))
    program = build_problem(BUNDLED, costs, Constraints(plans.CHOICES, Budget(3.0), plans.GRID))
    found_UC = plans.times_of(program, times, large)
    for row, (unit,) in enumerate(program.units):
        same = [w for w in large if w.block == unit.block and w.linear == unit.linear and w.kind == unit.kind]
        if unit.expert is not None:
            same = [w for w in same if w.expert is not None and w.expert % 16 == unit.expert]
            assert len(same) == 2
        for column, choice in enumerate(program.choices):
            expected = sum(choice.bits * w.numel * w.active_share for w in same)
            assert found_UC[row, column] == pytest.approx(expected, rel=1e-3)
    assert found_UC.dtype == np.int64


def test_fronts_are_the_points_that_no_other_beats_in_both() -> None:
    points = {"small": (1.0, 5.0), "beaten": (2.0, 6.0), "middle": (2.0, 3.0), "equal": (2.5, 3.0), "large": (9.0, 1.0)}
    assert front(points) == ["small", "middle", "large"]


def test_ratios_are_medians_of_turns_and_rates_of_the_median_turn() -> None:
    row = {"prompt": 8, "seconds": {
        "decode 16": {"bfloat16": [4.0, 8.0, 3.0], "plan": [2.0, 2.0, 3.0]},
        "prompt": {"bfloat16": [2.0, 4.0, 3.0]},
    }}  # fmt: skip
    assert faster(row, "decode 16") == 2.0
    assert rate(row, "decode 16") == 8.0
    assert faster(row, "prompt") == 1.0
    assert rate(row, "prompt") == pytest.approx(8 / 3)


def test_seeds_are_those_of_quality_and_types_of_llama_cpp_have_files_alone() -> None:
    options = Efficiency.parser().parse_args(["--seeds", "4", "5", "--plans", *EVERY])
    cases = set(Efficiency(options).cases())
    assert {case.seed for case in cases if case.part == "quality"} == {4, 5}
    assert {case.seed for case in cases if case.part != "quality"} == {4}
    assert {part for part in PARTS if Case(4, part, "Q3_K and Q4_0") in cases} == {"files", "memory"}
    assert {case.plan for case in cases if case.part == "packed"} == set(plans.PLANS)


def test_rows_that_are_no_super_blocks_are_on_4_bits() -> None:
    weights = plans.shapes_of(plans.config_of(num_experts=8, num_hidden_layers=1))
    found = plans.k_quants("q3_k", weights)
    kinds = {(w.kind, w.linear): found[w.name].kind for w in weights}
    assert kinds["routed", "up_proj"] == kinds["shared", "down_proj"] == kinds["attention", "q_proj"] == "q3_k"
    assert kinds["routed", "down_proj"] == "full_range"
    assert {grid.bits for grid in found.values() if grid.kind == "full_range"} == {4}


def test_tables_have_the_mean_over_seeds_and_bytes_over_those_of_the_file() -> None:
    rows = [
        {
            "part": "quality", "plan": "4 bits", "choices": {"w": 4}, "bits": 4.25, "large_bits": 4.25,
            "milliseconds": 2.0, "domains": {"prose": {"kl": kl}, "python": {"kl": 3 * kl}},
        }
        for kl in (0.01, 0.02)
    ]  # fmt: skip
    sides = {"file": 100 << 20, "resident": 110 << 20, "peak": 150 << 20}
    memory = {"part": "memory", "plan": "4 bits", "moeq": sides | {"tensors": 104 << 20}, "llama.cpp": sides}
    refused = {"part": "memory", "plan": "mixed", "moeq": memory["moeq"], "refused": "two types"}
    lines = report([*rows, memory, refused]).splitlines()
    assert "| 4 bits | 4.25 | 0.0300 +- 0.0141 | 4.25 | 0 / 0 / 1 / 0 | 2.0 |" in lines
    assert "| 4 bits | 100 | 1.04 | 1.10 | 1.50 | 100 | 1.10 | 1.50 |" in lines
    assert "| mixed | 100 | 1.04 | 1.10 | 1.50 | - | - | - |" in lines


def test_a_part_whose_plans_are_all_refused_says_why() -> None:
    text = report([{"part": "mlx", "plan": "mixed", "experts": 8, "refused": "two grids in one tensor"}])
    assert "Refused in MLX: mixed; such as: two grids in one tensor." in text


def test_without_a_counter_no_energy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.plan_speed.COUNTERS", tmp_path)
    assert joules() is None
    for socket, used in enumerate((2_000_000, 500_000)):
        (tmp_path / f"intel-rapl:{socket}").mkdir()
        (tmp_path / f"intel-rapl:{socket}" / "energy_uj").write_text(f"{used}\n")
    assert joules() == 2.5


@pytest.mark.slow
@pytest.mark.timeout(900)  # a survey, and eight processes one after another
def test_a_look_measures_every_part(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("mlx_lm")
    options = ["--plans", "bfloat16", "4 bits", "allocated per expert", "--prompt", "8", "--blocks", "1"]
    Efficiency.main(["--quick", "--folder", str(tmp_path / "rows"), "--json", str(tmp_path / "e.json"), *options])
    text = (tmp_path / "e.md").read_text()
    assert text.count("\n| 4 bits |") == 6
    assert "Refused in GGUF: allocated per expert" in text
    assert "Refused in MLX: allocated per expert" in text
    assert (tmp_path / "e.png").is_file()
