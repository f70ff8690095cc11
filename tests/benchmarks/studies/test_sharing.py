"""Programs of the study of sharing: weights of one key get one choice, and may be left alone."""

import numpy as np

from benchmarks.studies.sharing import KEPT_BITS, SHARING, shared, with_keeping
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.problem import AllocationProgram, build_problem
from moeq.allocation.solver import solve
from moeq.quant.spec import GridSpec
from tests.allocation.toy import CHOICES, toy_costs, toy_weights

WEIGHTS = toy_weights()
COSTS = toy_costs(WEIGHTS)


def program(budget: float, runtime: str = "research") -> AllocationProgram:
    constraints = Constraints(CHOICES, Budget(budget, "average_bits"), GridSpec(2, 16), runtime)
    return build_problem(WEIGHTS, COSTS, constraints)


def test_sharing_adds_up_costs_and_sizes_and_costs_the_more_the_more_share() -> None:
    for who, key in SHARING.items():
        found = shared(program(4.0), key)
        assert [w.name for unit in found.units for w in unit] != []
        for unit, cost_C, size_C in zip(found.units, found.cost_UC, found.size_UC, strict=True):
            assert {key(w) for w in unit} == {key(unit[0])}, who
            for choice, cost, size in zip(found.choices, cost_C, size_C, strict=True):
                assert np.isclose(cost, sum(COSTS[w.name][choice] for w in unit))
                overhead = sum(w.out_features * w.in_features // 16 * (16 + choice.bits) for w in unit)
                assert size == sum(w.numel * choice.bits for w in unit) + overhead
    by_sharing = [solve(shared(program(4.5), key)).cost for key in SHARING.values()]
    assert by_sharing[0] == min(by_sharing)
    assert by_sharing[-1] == max(by_sharing)
    assert len(shared(program(4.5), SHARING["uniform"]).units) == 1


def test_what_is_left_alone_costs_nothing_and_takes_sixteen_bits() -> None:
    free = with_keeping(program(KEPT_BITS))
    solution = solve(free)
    assert solution.cost == 0
    assert set(solution.choice_U.tolist()) == {len(CHOICES)}
    assert free.amount(solution.size) == KEPT_BITS
    assert solve(with_keeping(program(4.5))).cost <= solve(program(4.5)).cost
