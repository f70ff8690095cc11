"""The allocator: from predicted damage to a plan under a budget, and what each runtime constraint costs.

``allocate`` builds and solves the program of ``problem.py``; ``runtime_prices`` solves it for every runtime, so that
the damage one accepts for being readable by more systems is a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.allocation.problem import Budget, Floor, build_problem
from moeq.allocation.runtime import RUNTIMES, find_runtime
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
        num_units: Decisions: weights, experts or blocks, by the runtime.
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
    """Predicted damage under one runtime; None with a reason where no plan within the budget can be read by it."""

    runtime: str
    predicted: float | None
    used: float | None
    reason: str = ""


def allocate(
    weights: Sequence[WeightShape], costs: CostTable, choices: Sequence[Choice], budget: Budget, like: GridSpec, *,
    runtime: str = "research", floors: Sequence[Floor] = (), minimum_bits: Mapping[str, int] | None = None,
    fixed: Mapping[str, GridSpec] | None = None, solver: SolverName = "auto",
) -> Allocation:  # fmt: skip
    """The plan of least predicted damage within a budget.

    Args:
        weights: All quantizable weights of the model.
        costs: Predicted damage by weight and choice.
        choices: Bits and group sizes that a weight may get.
        budget: The limit, over all weights.
        like: Grid whose symmetry and clip search the chosen grids have.
        runtime: A name of ``runtime.RUNTIMES``: which weights share a width.
        floors: Experts of each block that must stay wide.
        minimum_bits: Least bits of some weights, by name.
        fixed: Grids of weights that are not chosen, by name.
        solver: "exact", "lagrangian", or "auto" by the number of variables.

    Raises:
        ValueError: The budget cannot be met (the nearest reachable ones are named), or a cost is missing.
    """
    fixed = fixed or {}
    problem = build_problem(
        weights, costs, choices, budget, find_runtime(runtime), like, floors=floors, minimum_bits=minimum_bits,
        fixed=fixed,
    )  # fmt: skip
    solution = solve(problem, solver)
    chosen = {
        weight.name: problem.choices[index].grid(like)
        for unit, index in zip(problem.units, solution.choice_U.tolist(), strict=True)
        for weight in unit
    }
    plan = {weight.name: fixed.get(weight.name) or chosen[weight.name] for weight in weights}
    return Allocation(
        plan, runtime, solution.cost, solution.gap, problem.amount(solution.size), budget, solution.solver,
        len(problem.units),
    )  # fmt: skip


def runtime_prices(
    weights: Sequence[WeightShape], costs: CostTable, choices: Sequence[Choice], budget: Budget, like: GridSpec, *,
    floors: Sequence[Floor] = (), minimum_bits: Mapping[str, int] | None = None,
    fixed: Mapping[str, GridSpec] | None = None, solver: SolverName = "auto",
) -> list[RuntimePrice]:  # fmt: skip
    """Predicted damage of the best plan for every runtime, at the same budget; arguments are those of ``allocate``."""
    prices = []
    for runtime in RUNTIMES:
        try:
            found = allocate(
                weights, costs, choices, budget, like, runtime=runtime, floors=floors, minimum_bits=minimum_bits,
                fixed=fixed, solver=solver,
            )  # fmt: skip
        except ValueError as error:
            prices.append(RuntimePrice(runtime, None, None, str(error)))
        else:
            prices.append(RuntimePrice(runtime, found.predicted, found.used))
    return prices


def predicted_cost(plan: Mapping[str, GridSpec], costs: CostTable) -> float | None:
    """Predicted damage of any plan, to compare it with an allocated one; None where the table lacks a choice of it."""
    total = 0.0
    for name, grid in plan.items():
        cost = costs.get(name, {}).get(Choice(grid.bits, grid.group_size))
        if cost is None:
            return None
        total += cost
    return total
