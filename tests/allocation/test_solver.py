import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from moeq.allocation.constraints import Budget, Constraints, Floor
from moeq.allocation.lagrangian import _floor_bound
from moeq.allocation.plan import Choice, plan_cost
from moeq.allocation.price import file_cost
from moeq.allocation.problem import AllocationProgram, build_problem
from moeq.allocation.runtime import RUNTIMES, check_runtime, find_runtime
from moeq.allocation.solver import solve
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import CHOICES, toy_costs, toy_weights

GRID = GridSpec(bits=2, group_size=16)
EVEN = GridSpec(bits=2, group_size=32, symmetric=True)  # what every runtime can hold
Q8 = {"model.layers.0.mlp.experts.0.gate_proj": 8}


def problem(
    weights: list[WeightShape], budget: Budget, runtime: str = "research", seed: int = 0, **options: object
) -> AllocationProgram:
    costs = toy_costs(weights, seed, options.pop("choices", CHOICES))  # type: ignore[arg-type]
    choices, like = sorted(next(iter(costs.values()))), options.pop("like", GRID)
    return build_problem(weights, costs, Constraints(choices, budget, like, runtime, **options))  # type: ignore[arg-type]


def plans_with_floors(task: AllocationProgram) -> Iterator[tuple[float, int]]:
    """Cost and size of every combination of choices that keeps the floors, which are counted expert by expert."""
    rows = np.arange(len(task.units))
    for picked in itertools.product(*[np.flatnonzero(np.isfinite(row)) for row in task.cost_UC]):
        wide = [
            sum(all(group.allowed_C[picked[unit]] for unit in expert) for expert in group.experts) >= group.num_experts
            for group in task.floors
        ]
        if all(wide):
            yield float(task.cost_UC[rows, picked].sum()), int(task.size_UC[rows, picked].sum())


def reference_optimum(task: AllocationProgram) -> float:
    """Least cost by trying every combination."""
    return min(cost for cost, size in plans_with_floors(task) if size <= task.capacity)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("floors", [(), (Floor(4, 1),), (Floor(4, 1), Floor(3, 2))])
def test_exact_solver_finds_the_optimum_of_all_combinations(seed: int, floors: tuple[Floor, ...]) -> None:
    # One block, two experts: 6 expert linears, each a unit of its own; the other weights are fixed.
    weights = toy_weights(num_blocks=1, num_experts=2)
    fixed = {w.name: GridSpec(2, 16) for w in weights if w.kind != "routed"}
    choices = CHOICES[:3]
    task = problem(weights, Budget(2.6, "code_bits"), seed=seed, choices=choices, fixed=fixed, floors=floors)
    optimum = reference_optimum(task)
    found = solve(task, "exact")
    assert found.cost == pytest.approx(optimum, rel=1e-5)
    assert found.bound <= optimum * (1 + 1e-9)
    relaxed = solve(task, "lagrangian")
    assert optimum * (1 - 1e-9) <= relaxed.cost
    assert relaxed.bound <= optimum * (1 + 1e-9)
    for solution in (found, relaxed):
        assert solution.size <= task.capacity
        for group in task.floors:
            wide = [all(group.allowed_C[solution.choice_U[unit]] for unit in expert) for expert in group.experts]
            assert sum(wide) >= group.num_experts


@pytest.mark.parametrize(
    ("floors", "bits"), [((Floor(4, 1),), 3.0), ((Floor(8, 2), Floor(4, 1)), 4.4), ((Floor(4, 0),), 3.0)]
)
@pytest.mark.parametrize("runtime", ["research", "gptqmodel", "vllm", "llama.cpp"])
def test_the_bound_of_the_lagrangian_counts_floors_and_stays_below_every_plan(
    runtime: str, floors: tuple[Floor, ...], bits: float
) -> None:
    # Where experts share a type, floors share units inside a block.
    num_blocks = 2 if runtime == "vllm" else 1
    weights, choices = toy_weights(num_blocks=num_blocks, num_experts=2), [Choice(b, 32) for b in (2, 4, 8)]
    kinds = ("routed",) if runtime == "research" else ("routed", "shared")
    fixed = {w.name: EVEN for w in weights if w.kind not in kinds}
    for seed in range(4):
        task = problem(weights, Budget(bits), runtime, seed, choices=choices, like=EVEN, fixed=fixed, floors=floors)
        plans = list(plans_with_floors(task))
        optimum = min(cost for cost, size in plans if size <= task.capacity)
        freely = problem(weights, Budget(bits), runtime, seed, choices=choices, like=EVEN, fixed=fixed)
        free = solve(freely, "lagrangian")
        assert free.bound * (1 - 1e-9) <= solve(task, "lagrangian").bound <= optimum * (1 + 1e-9)
        for price in np.geomspace(1e-3, 1e3, 7) * optimum / task.capacity:
            least = min(cost + price * (size - task.capacity) for cost, size in plans)
            assert _floor_bound(task, price) <= least + 1e-9 * optimum


@pytest.mark.parametrize("unit_and_value", [("code_bits", 2.5), ("average_bits", 3.5), ("active_bytes", 60_000)])
@pytest.mark.parametrize("floors", [(), (Floor(4, 2),)])
def test_lagrangian_path_is_within_a_thousandth_of_the_exact_optimum(
    unit_and_value: tuple[str, float], floors: tuple[Floor, ...]
) -> None:
    weights = toy_weights(num_blocks=4, num_experts=16)
    choices = [Choice(bits, size) for bits in (2, 3, 4, 8) for size in (16, 32)]
    for seed in (2,) if floors else (0, 2):
        task = problem(weights, Budget(unit_and_value[1], unit_and_value[0]), seed=seed, choices=choices, floors=floors)  # type: ignore[arg-type]
        exact, relaxed = solve(task, "exact"), solve(task, "lagrangian")
        assert exact.gap <= 2e-5
        assert exact.cost <= relaxed.cost <= 1.001 * exact.cost
        assert relaxed.bound <= exact.cost * (1 + 1e-9)
        assert relaxed.gap <= 2e-3
        assert relaxed.size <= task.capacity


def test_auto_takes_the_lagrangian_path_for_very_many_variables_and_comes_close_to_the_bound() -> None:
    weights = toy_weights(num_blocks=12, num_experts=256)
    for floors in ((), (Floor(4, 32),)):
        found = solve(problem(weights, Budget(2.5, "code_bits"), floors=floors))
        assert found.solver == "lagrangian"
        assert found.gap < 1e-4
    assert solve(problem(toy_weights(), Budget(2.5, "code_bits"))).solver == "exact"


@pytest.mark.parametrize("unit", ["code_bits", "average_bits", "bytes", "active_bytes"])
def test_a_budget_of_any_unit_is_kept_as_the_cost_of_the_plan_counts_it(unit: str) -> None:
    weights = toy_weights()
    least = {w.name: GridSpec(2, 16) for w in weights}
    value = 1.3 * getattr(plan_cost(least, weights), unit)
    task = problem(weights, Budget(value, unit))  # type: ignore[arg-type]
    found = solve(task)
    chosen = zip(task.units, found.choice_U, strict=True)
    plan = {w.name: task.choices[c].grid(GRID) for unit_, c in chosen for w in unit_}
    counted = getattr(plan_cost(plan, weights), unit)
    assert 0.97 * value < counted <= value
    assert task.amount(found.size) == pytest.approx(counted, abs=1 if "bytes" in unit else 1e-12)


def test_active_shares_are_exact_fractions() -> None:
    weights = toy_weights(num_experts=6)
    task = problem(weights, Budget(60_000, "active_bytes"))
    routed = next(row for row, unit in enumerate(task.units) if unit[0].kind == "routed")
    codes_and_overhead = 64 * 32 * 2 + 64 * 32 // 16 * (16 + 2)
    assert Fraction(int(task.size_UC[routed, 0]), task.parts // 8) == Fraction(codes_and_overhead, 3)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("unit", ["code_bits", "average_bits", "bytes", "active_bytes"])
def test_a_budget_is_kept_by_the_files_of_every_runtime(runtime: str, unit: str) -> None:
    weights = toy_weights(hidden=128, inner=64)
    choices = [Choice(bits, 64) for bits in (2, 3, 4, 5, 8)]
    files = find_runtime(runtime)
    least = {w.name: replace(EVEN, group_size=64) for w in weights}
    value = 1.4 * getattr(file_cost(least, weights, files), unit)
    task = problem(weights, Budget(value, unit), runtime, choices=choices, like=EVEN)  # type: ignore[arg-type]
    for solver in ("exact", "lagrangian"):
        found = solve(task, solver)  # type: ignore[arg-type]
        chosen = zip(task.units, found.choice_U, strict=True)
        plan = {w.name: task.choices[c].grid(EVEN) for unit_, c in chosen for w in unit_}
        check_runtime(plan, weights, files)
        counted = getattr(file_cost(plan, weights, files), unit)
        assert 0.9 * value < counted <= value * (1 + 1e-12)
        assert task.amount(found.size) == pytest.approx(counted, abs=1 if "bytes" in unit else 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_choices_of_one_type_compete_at_the_same_size(seed: int) -> None:
    weights = toy_weights(num_blocks=1, num_experts=2, inner=64)
    choices = [Choice(2, 64), Choice(3, 64), Choice(4, 64), Choice(4, 32)]
    fixed = {w.name: replace(EVEN, group_size=64) for w in weights if w.kind == "attention"}
    budget = Budget(3.0, "average_bits")
    task = problem(weights, budget, "llama.cpp", seed, choices=choices, like=EVEN, fixed=fixed)
    numel_U = np.array([sum(w.numel for w in unit) for unit in task.units])
    assert (task.size_UC == np.outer(numel_U, [2.25, 4.5, 4.5, 4.5])).all()
    optimum = reference_optimum(task)
    assert solve(task, "exact").cost == pytest.approx(optimum, rel=1e-5)
    assert optimum * (1 - 1e-9) <= solve(task, "lagrangian").cost <= 1.05 * optimum


def test_each_constraint_can_only_raise_the_predicted_error() -> None:
    weights = toy_weights(num_blocks=3, num_experts=6)
    choices = [Choice(bits, 32) for bits in (2, 4, 8)]  # what every runtime reads
    cost = {
        runtime: solve(problem(weights, Budget(3.0), runtime, choices=choices, like=EVEN), "exact").cost
        for runtime in RUNTIMES
    }
    assert cost["research"] < cost["gptqmodel"] < cost["vllm"]
    assert cost["research"] < cost["llama.cpp"] < cost["vllm"]
    assert cost["vllm"] == cost["sglang"]
    assert cost["llama.cpp"] == cost["mlx"]


def test_fixed_weights_give_their_type_to_those_that_share_it() -> None:
    weights = toy_weights(num_blocks=1, num_experts=3)
    choices = [Choice(bits, 32) for bits in (2, 3, 4, 8)]
    fixed = {"model.layers.0.mlp.experts.1.up_proj": replace(EVEN, bits=8), "model.layers.0.self_attn.q_proj": EVEN}
    for runtime, joined in (("llama.cpp", ".up_proj"), ("vllm", ".experts.")):
        task = problem(weights, Budget(6.0), runtime, choices=choices, like=EVEN, fixed=fixed)
        for unit, row in zip(task.units, task.cost_UC, strict=True):
            shares = unit[0].expert is not None and joined in unit[0].name
            fused = runtime == "vllm" and unit[0].linear in ("k_proj", "v_proj")
            allowed = [False, False, False, True] if shares else [True, True, True, not fused]
            assert np.isfinite(row).tolist() == allowed, unit[0].name
    with pytest.raises(ValueError, match=r"up_proj and 1 more that llama.cpp reads as one|up_proj: none of .* be Q8_0"):
        problem(weights, Budget(6.0), "llama.cpp", choices=choices[:3], like=EVEN, fixed=fixed)
    fixed["model.layers.0.mlp.experts.2.up_proj"] = EVEN
    with pytest.raises(
        ValueError, match=r"2.up_proj has 2g32 \(Q4_0\), .*1.up_proj has 8g32 \(Q8_0\): llama.cpp reads"
    ):
        problem(weights, Budget(6.0), "llama.cpp", choices=choices, like=EVEN, fixed=fixed)


def test_least_bits_and_fixed_weights_are_kept() -> None:
    weights = toy_weights()
    minimum = {w.name: 3 for w in weights if w.kind == "shared"}
    fixed = {w.name: GridSpec(8, 16) for w in weights if w.kind == "attention"}
    task = problem(weights, Budget(5.0, "code_bits"), minimum_bits=minimum, fixed=fixed)
    found = solve(task)
    assert not any(w.kind == "attention" for unit in task.units for w in unit)
    for unit, choice in zip(task.units, found.choice_U, strict=True):
        assert task.choices[choice].bits >= minimum.get(unit[0].name, 0)
    total = sum(w.numel for w in weights)
    spent = sum(task.choices[c].bits * unit[0].numel for unit, c in zip(task.units, found.choice_U, strict=True))
    assert spent + sum(8 * w.numel for w in weights if w.kind == "attention") <= 5.0 * total


def test_a_choice_whose_groups_do_not_fit_a_weight_is_not_offered_to_it() -> None:
    weights = toy_weights(num_experts=2)  # down_proj has 32 in-features
    task = problem(weights, Budget(8.0, "code_bits"), choices=[Choice(2, 32), Choice(4, 64)])
    for unit, row in zip(task.units, task.cost_UC, strict=True):
        assert np.isfinite(row).tolist() == [True, unit[0].in_features == 64]


def test_a_budget_below_the_least_of_a_runtime_names_that_and_what_would_lower_it() -> None:
    weights = toy_weights(hidden=128, inner=64)
    choices = [Choice(bits, 64) for bits in (2, 4)]
    with pytest.raises(
        ValueError, match=r"below the smallest plan in files for llama.cpp; .* budgets are 2.25 and 2\.2"
    ):
        solve(problem(weights, Budget(2.0, "average_bits"), "llama.cpp", choices=choices, like=EVEN))
    with pytest.raises(ValueError, match=r"budgets are 4.5 and .*: 2g64 4.5 \(symmetric 2.25\), 4g64 5.5"):
        solve(problem(weights, Budget(3.0, "average_bits"), "llama.cpp", choices=choices))


def test_more_budget_never_predicts_more_error() -> None:
    weights = toy_weights()
    costs = [solve(problem(weights, Budget(bits, "code_bits")), "exact").cost for bits in np.arange(2.0, 8.1, 0.5)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(costs))


def test_a_budget_that_cannot_be_met_names_the_nearest_reachable_ones() -> None:
    weights = toy_weights()
    total = sum(w.numel for w in weights)
    step = min(w.numel for w in weights) / total
    with pytest.raises(ValueError, match="nearest reachable budgets are") as error:
        solve(problem(weights, Budget(1.9, "code_bits")))
    assert (
        f"budget (1.9 code_bits) is below the smallest plan; the nearest reachable budgets are 2 and {2 + step:.6g}"
        in str(error.value)
    )
    assert "the largest is 8;" in str(error.value)
    with pytest.raises(ValueError, match=r"budget \(2\.1 code_bits\) is below .* reachable budgets are 2\.\d+ and"):
        solve(problem(weights, Budget(2.1, "code_bits"), floors=[Floor(4, 2)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"choices": [Choice(3, 16)], "runtime": "vllm"},
            "vllm reads none of the choices 3g16: compressed-tensors has no type that holds 3 bits, groups of 16",
        ),
        (
            {"choices": [Choice(8, 32)], "runtime": "vllm"},
            r"vllm reads none of the choices 8g32: .*: 8g32 no type \(symmetric 8.5\); --model.grid full_range",
        ),
        (
            {"choices": [Choice(4, 64)], "runtime": "llama.cpp", "like": EVEN},
            r"down_proj: none of the choices 4g64 .* divides its in_features \(32\), in a type of llama.cpp's files",
        ),
        (
            {"choices": [Choice(4, 32), Choice(8, 64)], "runtime": "vllm", "like": EVEN, "minimum_bits": Q8},
            r"experts.0.gate_proj and 11 more that vllm reads as one: none of the choices 4g32, 8g64 has at least 8",
        ),
        ({"choices": [Choice(3, 64)]}, r"none of the choices 3g64 has at least 0 bits and a group size that divides"),
        ({"floors": [Floor(4, 5)]}, r"floor: 5 experts at 4 bits in block 0, where 4 of 4 can have them"),
        ({"floors": [Floor(6, 1)], "choices": CHOICES[:3]}, "floor: 1 experts at 6 bits in block 0, where 0 of 4"),
        (
            {"minimum_bits": {"model.layers.0.self_attn.q_proj": 9}},
            r"q_proj: none of the choices .* has at least 9 bits",
        ),
    ],
)
def test_a_program_without_a_plan_says_why(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(toy_weights(), Budget(3.0, "code_bits"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [({}, r"has no 2g16 for model.layers.0.self_attn.q_proj"), ({CHOICES[0]: float("nan")}, "must be finite")],
)
def test_a_missing_or_broken_cost_names_the_weight(change: dict[Choice, float], message: str) -> None:
    weights = toy_weights()
    costs = toy_costs(weights)
    costs["model.layers.0.self_attn.q_proj"] = change
    with pytest.raises(ValueError, match=message):
        build_problem(weights, costs, Constraints(CHOICES, Budget(3.0), GRID))
