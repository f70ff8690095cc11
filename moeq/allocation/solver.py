"""Solve an allocation program: with ``scipy.optimize.milp`` (HiGHS), or by its Lagrangian for very many weights.

Both give a lower bound on the damage of any plan within the budget, so that what a plan gives away is known.

Shapes: U units, C choices.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moeq.allocation.lagrangian import Choices, cost_of, meet_floors, size_of, smallest_choices, solve_lagrangian
from moeq.allocation.problem import AllocationProgram
from moeq.allocation.two_limits import fastest, keeps_limits, solve_two_limits

SolverName = Literal["auto", "exact", "lagrangian"]
# Above so many 0/1 variables "auto" takes the Lagrangian path, whose gap shrinks as their number grows.
MAX_EXACT_VARIABLES = 20_000
# A limit of nodes, not of time: the same problem gives the same plan on every machine.
NODE_LIMIT = 20_000
RELATIVE_GAP = 1e-5


@dataclass(frozen=True)
class AllocationResult:
    """A feasible point of a program.

    Attributes:
        choice_U: Index of the choice of every unit.
        cost: Predicted damage.
        bound: No plan within the budget has less.
        size: What it takes, in parts of the budget unit, without fixed weights.
        solver: "exact" or "lagrangian".
    """

    choice_U: Choices
    cost: float
    bound: float
    size: int
    solver: str

    @property
    def gap(self) -> float:
        """Damage above the bound, relative to the damage."""
        return 0.0 if self.cost == self.bound else (self.cost - self.bound) / max(abs(self.cost), 1e-300)


def solve(problem: AllocationProgram, solver: SolverName = "auto") -> AllocationResult:
    """The plan of least predicted damage within the budget, and the limit of time where there is one.

    Raises:
        ValueError: The budget is too small; the nearest reachable budgets are named.  Or no plan within it is as fast
            as the limit of time.
    """
    check_reachable(problem)
    if solver == "auto":
        solver = "exact" if np.isfinite(problem.cost_UC).sum() <= MAX_EXACT_VARIABLES else "lagrangian"
    choice_U, bound = _solve_exact(problem) if solver == "exact" else _solve_relaxed(problem)
    cost = cost_of(problem, choice_U)
    return AllocationResult(choice_U, cost, min(bound, cost), size_of(problem, choice_U), solver)


def check_reachable(problem: AllocationProgram) -> None:
    """Raise ValueError where no plan keeps the limits; the nearest reachable budgets, or the least time, are named."""
    smallest = smallest_size(problem)
    if smallest > problem.capacity:
        raise ValueError(_unreachable(problem, smallest))
    if (limit := problem.limit) is not None and (least := fastest(problem)[1]) > limit.capacity:
        raise ValueError(
            f"milliseconds ({limit.milliseconds(limit.capacity):.6g}) is below the fastest plan that was found within "
            f"{problem.budget.value:.6g} {problem.budget.unit}, {limit.milliseconds(least):.6g}; raise either, or add "
            "faster choices"
        )


def smallest_size(problem: AllocationProgram) -> int:
    """Least size of any plan that keeps the floors."""
    return size_of(problem, smallest_choices(meet_floors(problem, np.inf), problem.size_UC))


def largest_size(problem: AllocationProgram) -> int:
    """Size of the largest plan."""
    return int(np.where(np.isfinite(problem.cost_UC), problem.size_UC, 0).max(1).sum())


def _unreachable(problem: AllocationProgram, smallest: int) -> str:
    least_U = np.where(np.isfinite(problem.cost_UC), problem.size_UC, np.iinfo(np.int64).max).min(1)
    above_UC = np.where(np.isfinite(problem.cost_UC), problem.size_UC - least_U[:, None], 0)
    step = int(above_UC[above_UC > 0].min()) if (above_UC > 0).any() else 0
    reachable = [problem.amount(smallest), problem.amount(smallest + step)]
    largest = problem.amount(largest_size(problem))
    files = "" if problem.runtime == "research" else f" in files for {problem.runtime}"
    note = f"; {problem.note}" if problem.note else ""
    least, less = ("fastest", "faster") if problem.budget.unit == "milliseconds" else ("smallest", "smaller")
    return (
        f"budget ({problem.budget.value:.6g} {problem.budget.unit}) is below the {least} plan{files}; the nearest "
        f"reachable budgets are {reachable[0]:.6g} and {reachable[1]:.6g}, the largest is {largest:.6g}; "
        f"raise the budget, add {less} choices, or lower floors, rules and fixed bits{note}"
    )


def _solve_exact(problem: AllocationProgram) -> tuple[Choices, float]:
    """The optimum by branch and cut; the Lagrangian plan where that found none (limit of nodes, tolerance)."""
    choice_U, bound = _milp(problem)
    if choice_U is not None and keeps_limits(problem, choice_U):
        return choice_U, bound
    choice_U, lagrangian_bound = _solve_relaxed(problem)
    return choice_U, max(bound, lagrangian_bound)


def _solve_relaxed(problem: AllocationProgram) -> tuple[Choices, float]:
    return solve_lagrangian(problem) if problem.limit is None else solve_two_limits(problem)


def _milp(problem: AllocationProgram) -> tuple[Choices | None, float]:
    """One call of HiGHS: (choice of every unit, or None where it found none; lower bound).

    HiGHS 1.12 (scipy 1.17) may print "HighsMipSolverData::transformNewIntegerFeasibleSolution" whatever its options
    say: https://github.com/ERGO-Code/HiGHS/issues/2783.
    """
    units, columns = np.isfinite(problem.cost_UC).nonzero()
    cost_N, size_N = problem.cost_UC[units, columns], problem.size_UC[units, columns]
    # Costs are brought to the order of one, sizes to the smallest whole numbers: the solver's tolerances are absolute.
    scale = float(np.abs(cost_N).mean()) or 1.0
    rows, auxiliary = _floor_rows(problem, units, columns)
    width = len(units) + auxiliary
    one = coo_array((np.ones(len(units)), (units, np.arange(len(units)))), shape=(len(problem.units), width))
    constraints = [LinearConstraint(one.tocsr(), 1, 1), _at_most(size_N, problem.capacity, width), *rows]
    if problem.limit is not None:
        constraints.append(_at_most(problem.limit.time_UC[units, columns], problem.limit.capacity, width))
    # A floor's auxiliary variables follow the 0/1 ones, so they need not be whole numbers themselves.
    result = milp(
        np.concatenate([cost_N / scale, np.zeros(auxiliary)]),
        integrality=np.concatenate([np.ones(len(units)), np.zeros(auxiliary)]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": RELATIVE_GAP, "node_limit": NODE_LIMIT},
    )
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
    if result.x is None:
        return None, bound
    values_UC = np.full(problem.cost_UC.shape, -1.0)
    values_UC[units, columns] = result.x[: len(units)]
    return values_UC.argmax(1), bound


def _at_most(size_N: NDArray[np.int64], capacity: int, width: int) -> LinearConstraint:
    """That sizes of what is chosen add up to no more than a capacity."""
    divisor, columns = int(np.gcd.reduce(size_N)) or 1, np.arange(len(size_N))
    total = coo_array((size_N / divisor, (np.zeros_like(columns), columns)), shape=(1, width))
    return LinearConstraint(total.tocsr(), -np.inf, capacity // divisor)


def _floor_rows(
    problem: AllocationProgram, units: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[list[LinearConstraint], int]:
    """Floors as constraints: z_e <= sum of allowed x_uc for every unit u of expert e, and sum_e z_e >= n per block."""
    position = np.full(problem.cost_UC.shape, -1)
    position[units, columns] = np.arange(len(units))
    entries: list[tuple[int, int, float]] = []
    lower: list[float] = []
    auxiliary = 0
    for group in problem.floors:
        first = len(units) + auxiliary
        for offset, members in enumerate(group.experts):
            for unit in members:
                allowed = position[unit, group.allowed_C & (position[unit] >= 0)]
                entries += [(len(lower), int(column), 1.0) for column in allowed]
                entries.append((len(lower), first + offset, -1.0))
                lower.append(0.0)
        entries += [(len(lower), first + offset, 1.0) for offset in range(len(group.experts))]
        lower.append(float(group.num_experts))
        auxiliary += len(group.experts)
    if not entries:
        return [], 0
    rows, variables, values = (np.array(part) for part in zip(*entries, strict=True))
    matrix = coo_array((values, (rows, variables)), shape=(len(lower), len(units) + auxiliary))
    return [LinearConstraint(matrix.tocsr(), np.array(lower), np.inf)], auxiliary
