"""The allocator: from predicted damage to a plan under a budget, and what each runtime constraint costs.

``allocate`` builds and solves the program of ``problem.py``; ``runtime_prices`` solves it for every runtime, so that
the damage one accepts for being readable by more systems is a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.allocation.price import file_cost
from moeq.allocation.problem import build_problem
from moeq.allocation.runtime import RUNTIMES
from moeq.allocation.solver import SolverName, solve
from moeq.quant.spec import GridSpec, WeightShape


@dataclass(frozen=True)
class Allocation:
    """A plan that an allocator found.

    Attributes:
        plan: Grid of every weight, fixed ones included.
        runtime: Which runtime it is for.
        predicted: Predicted damage of the weights that were chosen, in the unit of the cost table.
        gap: Relative distance of ``predicted`` from the least that is possible, at most.
        used: What the plan takes, in the unit of the budget.
        budget: The limit.
        solver: "exact" or "lagrangian".
        num_units: Decisions: weights, projections, experts or blocks, by the runtime.
    """

    plan: dict[str, GridSpec]
    runtime: str
    predicted: float
    gap: float
    used: float
    budget: Budget
    solver: str
    num_units: int


@dataclass(frozen=True)
class RuntimePrice:
    """Predicted damage under one runtime; None with a reason where no plan within the budget can be read by it.

    Attributes:
        runtime: Its name.
        predicted: Damage of its best plan, in the unit of the cost table.
        used: What that takes, in the unit of the budget.
        average_bits: Bits per weight of its files.
        reason: Why there is no plan.
    """

    runtime: str
    predicted: float | None
    used: float | None
    average_bits: float | None = None
    reason: str = ""


def allocate(
    weights: Sequence[WeightShape], costs: CostTable, constraints: Constraints, solver: SolverName = "auto"
) -> Allocation:
    """The plan of least predicted damage within a budget.

    Args:
        weights: All quantizable weights of the model.
        costs: Predicted damage by weight and choice.
        constraints: What the plan has to keep to.
        solver: "exact", "lagrangian", or "auto" by the number of variables.

    Raises:
        ValueError: The budget cannot be met (the nearest reachable ones are named), or a cost is missing.
    """
    problem = build_problem(weights, costs, constraints)
    solution = solve(problem, solver)
    chosen = {
        weight.name: problem.choices[index].grid(constraints.like)
        for unit, index in zip(problem.units, solution.choice_U.tolist(), strict=True)
        for weight in unit
    }
    return Allocation(
        plan={weight.name: constraints.fixed.get(weight.name) or chosen[weight.name] for weight in weights},
        runtime=constraints.runtime,
        predicted=solution.cost,
        gap=solution.gap,
        used=problem.amount(solution.size),
        budget=constraints.budget,
        solver=solution.solver,
        num_units=len(problem.units),
    )


def runtime_prices(
    weights: Sequence[WeightShape], costs: CostTable, constraints: Constraints, solver: SolverName = "auto"
) -> list[RuntimePrice]:
    """Predicted damage of the best plan for every runtime, all else as ``constraints``; arguments of ``allocate``."""
    prices = []
    for name, runtime in RUNTIMES.items():
        try:
            found = allocate(weights, costs, replace(constraints, runtime=name), solver)
        except ValueError as error:
            prices.append(RuntimePrice(name, None, None, reason=str(error)))
        else:
            takes = file_cost(found.plan, weights, runtime, constraints.carrier)
            prices.append(RuntimePrice(name, found.predicted, found.used, takes.average_bits))
    return prices


def predicted_cost(plan: Mapping[str, GridSpec], costs: CostTable) -> float | None:
    """Predicted damage of any plan, to compare it with an allocated one; None where the table lacks a choice of it."""
    total = 0.0
    for name, grid in plan.items():
        cost = costs.get(name, {}).get(Choice.of(grid))
        if cost is None:
            return None
        total += cost
    return total
