"""A limit of time beside the budget: a price on time joins the costs until the plan keeps it.

    min_x cost + price (time - capacity)    over plans within the budget

has one limit again, which ``lagrangian.py`` solves; at every price its bound is one on the damage of any plan that
keeps both limits.  The price is doubled until a plan keeps the time, then brought down to the least that does.
"""

from dataclasses import replace

import numpy as np

from moeq.allocation.lagrangian import Choices, cost_of, size_of, smallest_choices, solve_lagrangian
from moeq.allocation.problem import AllocationProgram, TimeLimit

# Prices that are tried at most, and the relative distance of the last two.
MAX_PRICES, CLOSE_PRICES = 40, 1e-3


def keeps_limits(problem: AllocationProgram, choice_U: Choices) -> bool:
    """Whether a choice for every unit keeps the budget, and the limit of time where there is one."""
    limit = problem.limit
    return size_of(problem, choice_U) <= problem.capacity and (
        limit is None or time_of(limit, choice_U) <= limit.capacity
    )


def time_of(limit: TimeLimit, choice_U: Choices) -> int:
    """Nanoseconds of a choice for every unit, without fixed weights."""
    return int(np.take_along_axis(limit.time_UC, choice_U[:, None], 1).sum())


def fastest(problem: AllocationProgram) -> tuple[Choices, int]:
    """The fastest plan within the budget that was found, and its time; the smallest plan must fit the budget."""
    assert problem.limit is not None
    timed = np.where(np.isfinite(problem.cost_UC), problem.limit.time_UC.astype(float), np.inf)
    alone = replace(problem, cost_UC=timed, limit=None)
    choice_U, _ = solve_lagrangian(alone)
    if not problem.floors:  # without a budget to keep it would be this one
        free_U = smallest_choices(timed, problem.limit.time_UC)
        choice_U = free_U if size_of(problem, free_U) <= problem.capacity else choice_U
    return choice_U, time_of(problem.limit, choice_U)


def solve_two_limits(problem: AllocationProgram) -> tuple[Choices, float]:
    """A plan within both limits and a lower bound on the damage of any; ``fastest`` must keep the limit of time."""
    limit = problem.limit
    assert limit is not None
    best_U, _ = fastest(problem)
    choice_U, bound = solve_lagrangian(replace(problem, limit=None))
    if time_of(limit, choice_U) <= limit.capacity:
        return choice_U, bound
    low, high = 0.0, (abs(cost_of(problem, best_U) - bound) or 1.0) / max(1, limit.capacity)
    kept = False
    for _ in range(MAX_PRICES):
        price = (low + high) / 2 if kept else high
        cost_UC = problem.cost_UC + price * limit.time_UC
        choice_U, priced = solve_lagrangian(replace(problem, cost_UC=cost_UC, limit=None))
        bound = max(bound, priced - price * limit.capacity)
        if time_of(limit, choice_U) <= limit.capacity:
            kept, high = True, price
            best_U = min(best_U, choice_U, key=lambda choices: cost_of(problem, choices))
        else:
            low, high = price, high if kept else 2 * price
        if kept and high - low <= CLOSE_PRICES * high:
            break
    return best_U, bound
