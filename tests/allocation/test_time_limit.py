"""Time as a cost of a plan: tables are made up, and plans are held against every combination."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeq.allocation.constraints import Budget, Constraints, Floor
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.dry_run import rehearse
from moeq.allocation.evidence import Promise
from moeq.allocation.plan import plan_cost
from moeq.allocation.plan_report import allocation_report, allocation_to_json, cost_summary
from moeq.allocation.problem import AllocationProgram, build_problem
from moeq.allocation.solver import solve
from moeq.allocation.time_table import Machine, TimeTable, plan_milliseconds, read_times, this_machine
from moeq.allocation.two_limits import time_of
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import CHOICES, toy_costs, toy_evidence, toy_weights

GRID = GridSpec(bits=2, group_size=16)
WEIGHTS = toy_weights()
EVIDENCE = toy_evidence(WEIGHTS)
# As on a processor: 4 bits are fastest, 3 slowest.
MICROSECONDS = {"2g16": 7, "3g16": 9, "4g16": 4, "8g16": 8}


def made_table(weights: list[WeightShape], **changes: Any) -> TimeTable:
    """Times that grow with the size of a weight."""
    seconds = {
        (label, w.out_features, w.in_features, 1): 1e-6 * micro * w.numel / 2048
        for w in weights
        for label, micro in MICROSECONDS.items()
    }
    return replace(TimeTable(this_machine(torch.bfloat16), False, False, seconds), **changes)


def written(folder: Path, table: TimeTable) -> str:
    path = folder / "times.json"
    path.write_text(json.dumps(table.to_json()))
    return str(path)


def small_problem(seed: int, budget: Budget, milliseconds: float | None = None, **options: Any) -> AllocationProgram:
    """Six units: the linears of two experts; the other weights are fixed."""
    weights = toy_weights(num_blocks=1, num_experts=2)
    fixed = {w.name: GridSpec(2, 16) for w in weights if w.kind != "routed"}
    constraints = Constraints(
        CHOICES, budget, GRID, fixed=fixed, times=made_table(weights), milliseconds=milliseconds, **options
    )
    return build_problem(weights, toy_costs(weights, seed), constraints)


def reference_milliseconds(plan: dict[str, GridSpec], weights: list[WeightShape]) -> float:
    """By hand: top-2 of the experts, everything else always."""
    total = 0.0
    for weight in weights:
        micro = MICROSECONDS[f"{plan[weight.name].bits}g16"] * weight.out_features * weight.in_features / 2048
        num_experts = len({w.expert for w in weights if w.block == weight.block and w.expert is not None})
        total += micro / 1000 * (2 / num_experts if ".experts." in weight.name else 1)
    return total


def reference_optimum(task: AllocationProgram) -> float:
    """Least cost within both limits by trying every combination."""
    rows, best = np.arange(len(task.units)), np.inf
    for picked in itertools.product(range(len(task.choices)), repeat=len(task.units)):
        wide = [
            sum(all(group.allowed_C[picked[unit]] for unit in expert) for expert in group.experts) >= group.num_experts
            for group in task.floors
        ]
        in_time = task.limit is None or int(task.limit.time_UC[rows, picked].sum()) <= task.limit.capacity
        if all(wide) and in_time and int(task.size_UC[rows, picked].sum()) <= task.capacity:
            best = min(best, float(task.cost_UC[rows, picked].sum()))
    return best


def test_milliseconds_of_a_plan_count_experts_by_how_often_they_are_used() -> None:
    plan = {w.name: GridSpec((2, 3, 4, 8)[index % 4], 16) for index, w in enumerate(WEIGHTS)}
    assert plan_milliseconds(plan, WEIGHTS, made_table(WEIGHTS)) == pytest.approx(reference_milliseconds(plan, WEIGHTS))


@pytest.mark.parametrize("seed", range(3))
def test_with_milliseconds_as_the_budget_the_exact_plan_is_the_best_of_all_combinations(seed: int) -> None:
    fixed = 7e-3 * (4 * 2 + 3)  # attention of 64 x 64, shared expert of 32 x 64
    task = small_problem(seed, Budget(fixed + 6 * 5.5e-3, "milliseconds"))
    optimum = reference_optimum(task)
    assert task.fixed_size == pytest.approx(fixed * 1e6)
    for solver in ("exact", "lagrangian"):
        found = solve(task, solver)  # type: ignore[arg-type]
        assert found.bound <= optimum * (1 + 1e-9)
        assert found.size <= task.capacity
        assert task.amount(found.size) <= fixed + 6 * 5.5e-3
        assert found.cost == pytest.approx(optimum, rel=1e-5 if solver == "exact" else 0.3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("floors", [(), (Floor(3, 1),)])
def test_a_limit_of_time_beside_bits_gives_the_best_of_the_combinations_that_keep_both(
    seed: int, floors: tuple[Floor, ...]
) -> None:
    task = small_problem(seed, Budget(2.6, "code_bits"), milliseconds=1.0, floors=floors)
    assert task.limit is not None
    free = solve(replace(task, limit=None), "exact")
    capacity = int(0.97 * time_of(task.limit, free.choice_U))  # so that the limit binds
    task = replace(task, limit=replace(task.limit, capacity=capacity))
    assert task.limit is not None
    optimum = reference_optimum(task)
    assert free.cost < optimum < np.inf
    for solver in ("exact", "lagrangian"):
        found = solve(task, solver)  # type: ignore[arg-type]
        assert found.bound <= optimum * (1 + 1e-9)
        assert found.cost == pytest.approx(optimum, rel=1e-5) or (solver == "lagrangian" and found.cost > optimum)
        assert time_of(task.limit, found.choice_U) <= task.limit.capacity
        assert found.size <= task.capacity


def test_by_its_price_the_limit_of_time_is_kept_near_the_bound_in_a_large_model() -> None:
    weights = toy_weights(num_blocks=4, num_experts=16)
    slow = replace(GRID, bits=3)
    table = made_table(weights)
    milliseconds = 0.85 * plan_milliseconds({w.name: slow for w in weights}, weights, table)
    constraints = Constraints(CHOICES, Budget(3.0), GRID, times=table, milliseconds=milliseconds)
    task = build_problem(weights, toy_costs(weights), constraints)
    exact, priced = solve(task, "exact"), solve(task, "lagrangian")
    assert exact.cost <= priced.cost * (1 + 1e-9) <= 1.01 * exact.cost
    assert priced.bound <= exact.cost * (1 + 1e-9)
    assert priced.gap < 0.02


def test_a_plan_under_milliseconds_is_within_them_and_its_report_says_time_and_bits(tmp_path: Path) -> None:
    table = made_table(WEIGHTS)
    spec = AllocationSpec(
        method="allocate", cost="fisher", budget=0.3, budget_unit="milliseconds", times=written(tmp_path, table)
    )
    decision = decide(spec, WEIGHTS, GRID, EVIDENCE)
    takes = reference_milliseconds(decision.plan, WEIGHTS)
    assert 0.29 < takes <= 0.3 + 1e-9
    assert {grid.bits for grid in decision.plan.values()} == {4, 8}, "2 and 3 bits are slower than 4, and worse"
    data, report = allocation_to_json(decision, WEIGHTS), allocation_report(decision, WEIGHTS)
    assert data["time"]["milliseconds"] == pytest.approx(takes)
    assert data["allocation"]["used"] == pytest.approx(takes, abs=1e-4)
    assert f"Time: {takes:.4g} milliseconds" in report
    assert f"{takes:.4g} milliseconds" in cost_summary(decision, WEIGHTS)
    assert f"{plan_cost(decision.plan, WEIGHTS).code_bits:.3f} bits" in cost_summary(decision, WEIGHTS)
    assert "| runtime |" not in report


def test_beside_bits_a_plan_keeps_both_and_is_checked_by_rules_and_given_plans_alike(tmp_path: Path) -> None:
    times = written(tmp_path, made_table(WEIGHTS))
    common: dict[str, Any] = {"method": "allocate", "cost": "fisher", "budget": 3.0, "times": times}
    free = decide(AllocationSpec(**common), WEIGHTS, GRID, EVIDENCE)
    limit = 0.97 * reference_milliseconds(free.plan, WEIGHTS)
    decision = decide(AllocationSpec(**common, milliseconds=limit), WEIGHTS, GRID, EVIDENCE)
    assert reference_milliseconds(decision.plan, WEIGHTS) <= limit
    assert plan_cost(decision.plan, WEIGHTS).code_bits <= 3.0
    with pytest.raises(ValueError, match=r"the plan takes [\d.]+ milliseconds where the budget is"):
        decide(AllocationSpec(routed=3, times=times, milliseconds=0.2), WEIGHTS, GRID)


def test_limits_that_no_plan_keeps_are_refused_before_a_survey_with_the_fastest(tmp_path: Path) -> None:
    times = written(tmp_path, made_table(WEIGHTS))
    promise = Promise(costs=("fisher",), choices=tuple(CHOICES))
    fastest = reference_milliseconds({w.name: replace(GRID, bits=4) for w in WEIGHTS}, WEIGHTS)
    common: dict[str, Any] = {"method": "allocate", "cost": "fisher", "times": times}
    spec = AllocationSpec(**common, budget=0.1, budget_unit="milliseconds")
    with pytest.raises(ValueError, match=rf"below the fastest plan; the nearest reachable budgets are {fastest:.6g}"):
        rehearse(spec, WEIGHTS, GRID, promise)
    tight = AllocationSpec(**common, budget=2.0, milliseconds=fastest)
    slowest = reference_milliseconds(dict.fromkeys((w.name for w in WEIGHTS), GRID), WEIGHTS)
    with pytest.raises(ValueError, match=rf"fastest plan that was found within 2 code_bits, {slowest:.6g}; raise"):
        rehearse(tight, WEIGHTS, GRID, promise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 5.0, "budget_unit": "milliseconds"}, "needs times, measured by python -m moeq.timing"),
        ({"budget": 3.0, "milliseconds": 5.0}, "needs times"),
        ({"budget": 5.0, "budget_unit": "milliseconds", "milliseconds": 5.0, "times": "x"}, "leave one out"),
        ({"budget": 3.0, "times": "x", "runtime": "llama.cpp"}, "not of llama.cpp"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocationSpec(method="allocate", cost="fisher", **options)


def test_a_table_of_another_machine_is_refused_unless_that_one_serves(tmp_path: Path) -> None:
    here = this_machine(torch.bfloat16)
    other = Machine("Another Processor", here.capability, here.torch, 4, "bfloat16")
    path = Path(written(tmp_path, made_table(WEIGHTS, machine=other)))
    with pytest.raises(ValueError, match=r"of another machine \(processor Another Processor, here .*served_elsewhere"):
        read_times(path)
    assert read_times(path, served_elsewhere=True).machine == other
    mine = made_table(WEIGHTS, machine=replace(here, threads=64, dtype="float32"))
    assert read_times(Path(written(tmp_path, mine))) == mine  # threads are chosen by whoever serves


def test_what_was_not_measured_is_named(tmp_path: Path) -> None:
    table = made_table(WEIGHTS)
    missing = replace(table, seconds={key: value for key, value in table.seconds.items() if key[0] != "3g16"})
    spec = AllocationSpec(
        method="allocate", cost="fisher", budget=0.5, budget_unit="milliseconds", times=written(tmp_path, missing)
    )
    with pytest.raises(ValueError, match=r"no 3g16 for weights of 64 x 64 such as .*q_proj .*: 2g16, 4g16, 8g16\)"):
        decide(spec, WEIGHTS, GRID, EVIDENCE)
    with pytest.raises(ValueError, match=r"of this shape they have: nothing"):
        table.of(replace(WEIGHTS[0], out_features=48), GRID)
    with pytest.raises(ValueError, match=r"times are of zero points, and the grid of .* is symmetric"):
        table.of(WEIGHTS[0], replace(GRID, symmetric=True))


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path) -> None:
    data = made_table(WEIGHTS).to_json()
    wrong = {
        "no times at": None, "must be 1": data | {"version": 2}, "is no table": {"version": 1},
        "must be positive": data | {"products": [data["products"][0] | {"seconds": -1.0}]},
        "unexpected": data | {"machine": asdict(this_machine(torch.bfloat16)) | {"cores": 2}},
    }  # fmt: skip
    for message, content in wrong.items():
        path = tmp_path / "wrong.json"
        if content is not None:
            path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            read_times(path)
        assert "\n" not in str(error.value)
    (tmp_path / "half.json").write_text('{"version": 1, "machine": {')
    with pytest.raises(ValueError, match=r"half\.json: "):
        read_times(tmp_path / "half.json")
