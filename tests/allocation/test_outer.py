"""The search around an allocated plan: what it finds where errors are correlated, its budget, its end."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from moeq.allocation.allocate import allocate
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.decide import AllocationSpec, decide
from moeq.allocation.evidence import CostTable, Evidence
from moeq.allocation.outer import Plan, SearchSpec, local_costs, search
from moeq.allocation.plan import Choice, plan_cost
from moeq.allocation.plan_report import allocation_report, allocation_to_json
from moeq.quant.spec import GridSpec, WeightShape
from tests.allocation.toy import toy_weights

CHOICES = (Choice(2, 16), Choice(3, 16), Choice(4, 16))
GRID = GridSpec(2, 16)


class QuadraticModel:
    """KL = 1/2 d F d, d the sum of an error vector per weight and choice: all of the search in closed form."""

    def __init__(self, weights: Sequence[WeightShape], seed: int = 0, size: int = 60) -> None:
        generator = np.random.default_rng(seed)
        mix = generator.normal(size=(size, size))
        self.curvature = mix @ mix.T / size
        common = 0.4 * generator.normal(size=size)  # what makes errors of different weights add up
        self.errors = {
            (w.name, c): 2.0**-c.bits * (generator.normal(size=size) + generator.choice([-1, 0, 1]) * common)
            for w in weights
            for c in CHOICES
        }
        self.num_measured = self.num_slopes = 0

    def kl(self, plan: Plan) -> float:
        total = sum(self.errors[name, Choice.of(grid)] for name, grid in plan.items())
        return float(total @ self.curvature @ total / 2)

    def costs(self) -> CostTable:
        """Of every weight alone."""
        return {
            name: {c: float(e @ self.curvature @ e / 2) for (other, c), e in self.errors.items() if other == name}
            for name in dict.fromkeys(name for name, _ in self.errors)
        }

    def measure(self, plans: Sequence[Plan]) -> list[float]:
        self.num_measured += len(plans)
        return [self.kl(plan) for plan in plans]

    def slopes(self, plan: Plan) -> CostTable:
        self.num_slopes += 1
        total = sum(self.errors[name, Choice.of(grid)] for name, grid in plan.items())
        gradient = self.curvature @ total
        return {
            name: {c: float(gradient @ (self.errors[name, c] - self.errors[name, Choice.of(grid)])) for c in CHOICES}
            for name, grid in plan.items()
        }


@pytest.fixture(scope="module")
def weights() -> list[WeightShape]:
    return toy_weights(num_blocks=2, num_experts=2)


CONSTRAINTS = Constraints(CHOICES, Budget(2.7), GRID)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_lowers_the_measured_kl_within_the_budget(weights: list[WeightShape], seed: int) -> None:
    model = QuadraticModel(weights, seed)
    program = allocate(weights, model.costs(), CONSTRAINTS)
    found, how = search(weights, model.costs(), CONSTRAINTS, model, num_rounds=4)
    assert how.kl_before == model.kl(program.plan)
    assert how.kl_after == model.kl(found.plan) < how.kl_before
    assert plan_cost(found.plan, weights).code_bits <= 2.7
    assert (how.num_measured, how.num_slopes) == (model.num_measured, model.num_slopes)
    assert found.predicted >= program.predicted


def test_a_search_comes_close_to_the_best_of_all_plans() -> None:
    weights = toy_weights(num_blocks=1, num_experts=1)[:7]
    model = QuadraticModel(weights, 1, size=12)
    constraints = Constraints(CHOICES, Budget(3.0), GRID)
    plans = (
        dict(zip([w.name for w in weights], (c.grid(GRID) for c in row), strict=True))
        for row in product(CHOICES, repeat=len(weights))
    )
    affordable = [model.kl(plan) for plan in plans if plan_cost(plan, weights).code_bits <= 3.0]
    _, how = search(weights, model.costs(), constraints, model, num_rounds=8)
    gained, possible = how.kl_before - how.kl_after, how.kl_before - min(affordable)
    assert gained > 0.5 * possible


def test_changes_of_single_weights_are_those_of_the_quadratic_but_for_their_own_errors(
    weights: list[WeightShape],
) -> None:
    model = QuadraticModel(weights)
    plan = allocate(weights, model.costs(), CONSTRAINTS).plan
    table = local_costs(plan, model.costs(), model.slopes(plan), 1.0)
    for name, row in table.items():
        now = Choice.of(plan[name])
        assert row[now] == 0.0
        for choice in CHOICES:
            if choice != now:
                real = model.kl(plan | {name: choice.grid(GRID)}) - model.kl(plan)
                own = model.errors[name, now] @ model.curvature @ model.errors[name, choice]
                assert row[choice] - own == pytest.approx(real, rel=1e-9, abs=1e-12)


def test_a_search_that_finds_nothing_better_keeps_the_plan_of_the_program(weights: list[WeightShape]) -> None:
    class Stubborn(QuadraticModel):
        """Every other plan is as good."""

        def kl(self, plan: Plan) -> float:
            return 1.0

    model = Stubborn(weights)
    found, how = search(weights, model.costs(), CONSTRAINTS, model, num_rounds=4)
    program = allocate(weights, model.costs(), CONSTRAINTS)
    assert found.plan == program.plan
    assert found.predicted == pytest.approx(program.predicted)
    assert (how.kl_before, how.kl_after, model.num_slopes) == (1.0, 1.0, 1)
    assert all(each.num_changed == 0 for each in how.rounds)


def test_a_run_decides_by_search_and_reports_it(weights: list[WeightShape]) -> None:
    model = QuadraticModel(weights)
    spec = AllocationSpec(
        method="allocate", cost="fisher", budget=2.7, choices=("2", "3", "4"), search=SearchSpec(num_rounds=2), shared=3
    )
    decision = decide(spec, weights, GRID, Evidence(costs={"fisher": model.costs()}), model)
    assert decision.searched is not None
    assert model.kl(decision.plan) == decision.searched.kl_after < decision.searched.kl_before
    assert {decision.plan[w.name].bits for w in weights if w.kind == "shared"} == {3}
    assert allocation_to_json(decision, weights)["search"]["kl_after"] == decision.searched.kl_after
    assert f"{decision.searched.kl_after:.5f} after the search" in allocation_report(decision, weights)


def test_a_search_without_a_judge_or_costs_in_nats_is_refused(weights: list[WeightShape]) -> None:
    model = QuadraticModel(weights)
    spec = AllocationSpec(method="allocate", cost="fisher", budget=2.7, choices=(2, 3, 4), search=SearchSpec())
    with pytest.raises(ValueError, match="put Survey before BitAllocation"):
        decide(spec, weights, GRID, Evidence(costs={"fisher": model.costs()}))
    with pytest.raises(ValueError, match=r"cost \(hessian\) fisher or fisher_kl"):
        AllocationSpec(method="allocate", cost="hessian", budget=2.7, search=SearchSpec())
    with pytest.raises(ValueError, match=r"num_rounds \(0\)"):
        SearchSpec(num_rounds=0)
