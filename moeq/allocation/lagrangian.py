"""The Lagrangian path: linear relaxation by sorting, then exchanges between units.

With a price p on size every unit decides for itself, ``min_c cost_uc + p size_uc``; the price at which the budget is
just kept gives a lower bound on the damage of any plan (Everett, 1963).  For a multiple-choice knapsack that relaxation
is solved by sorting (Sinha and Zoltners, 1979): walk the lower convex hull of (size, cost) of every unit, all steps of
all units in the order of cost saved per size, until the budget is used up.  At most one step does not fit; what is left
is spent by changing one unit, or two against each other, while that lowers the damage.  With few units the result
depends on where that starts, so it also starts from relaxations of slightly smaller budgets.

Floors are met before: in each block the experts for which it costs least at that price keep to the wide choices.  At a
price the least that any plan with floors can pay is known as well, which makes the bound theirs.

Why it stands beside ``scipy.optimize.milp``: on programs of the size of Qwen3-30B (74,496 variables, floors of 16
experts) both find plans of the same predicted damage within 2e-6, and milp takes hundreds of times as long.

Shapes: U units, C choices, S hull steps, M moves.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeq.allocation.problem import AllocationProgram, FloorGroup

Choices = NDArray[np.int64]
Floats = NDArray[np.float64]
# Exchanges stop at this relative distance from the bound, or after so many.
CLOSE_ENOUGH, MAX_EXCHANGES = 1e-7, 400
# Shares of the budget that a start keeps for the exchanges; further starts are made while the plan is not good enough.
KEPT, GOOD_ENOUGH = (0.0, 0.001, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03), 3e-4
# The price of size decides who meets a floor, and meeting it changes the price.
FLOOR_ROUNDS = 3


def cost_of(problem: AllocationProgram, choice_U: Choices) -> float:
    """Predicted damage of a choice for every unit."""
    return float(np.take_along_axis(problem.cost_UC, choice_U[:, None], 1).sum())


def size_of(problem: AllocationProgram, choice_U: Choices) -> int:
    """Size of a choice for every unit, in parts of the budget unit."""
    return int(np.take_along_axis(problem.size_UC, choice_U[:, None], 1).sum())


def solve_lagrangian(problem: AllocationProgram) -> tuple[Choices, float]:
    """A plan within the budget and a lower bound on the damage of any; the smallest plan must fit the budget."""
    _, bound, price = _relax(problem.cost_UC, problem)
    bounds = [bound, _floor_bound(problem, price)]
    candidates = []
    for _ in range(FLOOR_ROUNDS if problem.floors else 1):
        cost_UC = meet_floors(problem, price)
        smallest_U = smallest_choices(cost_UC, problem.size_UC)
        if size_of(problem, smallest_U) <= problem.capacity:
            price = _relax(cost_UC, problem)[2]
            bounds.append(_floor_bound(problem, price))
            candidates.append(_search(cost_UC, problem))
        else:
            price *= 2
    if not candidates:
        # The budget is just enough for the floors: let size alone decide who meets them.
        cost_UC = meet_floors(problem, np.inf)
        candidates.append(_search(cost_UC, problem))
    return min(candidates, key=lambda candidate: cost_of(problem, candidate)), max(bounds)


def smallest_choices(cost_UC: Floats, size_UC: NDArray[np.int64]) -> Choices:
    """The smallest choice of every unit; of equally small ones the one of least cost."""
    size = np.where(np.isfinite(cost_UC), size_UC, np.iinfo(np.int64).max)
    return np.where(size == size.min(1, keepdims=True), cost_UC, np.inf).argmin(1)


def _relax(cost_UC: Floats, problem: AllocationProgram) -> tuple[Choices, float, float]:
    """Whole steps of the linear relaxation: (choice of every unit, its lower bound, the price of size)."""
    choice_U = smallest_choices(cost_UC, problem.size_UC)
    room = problem.capacity - size_of(problem, choice_U)
    base = float(np.take_along_axis(cost_UC, choice_U[:, None], 1).sum())
    unit_S, target_S, gain_S, grow_S = _hull_steps(cost_UC, problem.size_UC, choice_U)
    # A stable sort keeps the steps of one unit in their order, as their gain per size never rises.
    order = np.argsort(-gain_S / grow_S, kind="stable")
    unit_S, target_S, gain_S, grow_S = unit_S[order], target_S[order], gain_S[order], grow_S[order]
    num = int(np.searchsorted(np.cumsum(grow_S), room, side="right"))
    choice_U = choice_U.copy()
    choice_U[unit_S[:num]] = target_S[:num]  # the last assignment to a unit is its last step
    bound, price = base - float(gain_S[:num].sum()), 0.0
    if num < len(order):
        price = float(gain_S[num] / grow_S[num])
        bound -= price * float(room - grow_S[:num].sum())
    return choice_U, bound, price


def _hull_steps(
    cost_UC: Floats, size_UC: NDArray[np.int64], start_U: Choices
) -> tuple[Choices, Choices, Floats, NDArray[np.int64]]:
    """Steps along the lower convex hull of every unit: unit, choice reached, cost saved, size added; unit by step."""
    rows = np.arange(len(cost_UC))
    current_U, steps = start_U, []
    for _ in range(cost_UC.shape[1] - 1):
        gain_UC = cost_UC[rows, current_U][:, None] - cost_UC
        grow_UC = size_UC - size_UC[rows, current_U][:, None]
        useful = np.isfinite(cost_UC) & (gain_UC > 0) & (grow_UC > 0)
        rate_UC = np.where(useful, gain_UC, 0) / np.where(useful, grow_UC, 1)
        # Of equal rates the longest step, so that none of its points is visited twice.
        best_UC = np.where(useful & (rate_UC == rate_UC.max(1, keepdims=True)), grow_UC, -1)
        target_U, moving = best_UC.argmax(1), useful.any(1)
        if not moving.any():
            break
        unit, target = rows[moving], target_U[moving]
        steps.append((unit, target, gain_UC[unit, target], grow_UC[unit, target]))
        current_U = np.where(moving, target_U, current_U)
    if not steps:
        empty = np.zeros(0, np.int64)
        return empty, empty, np.zeros(0), empty
    unit_S, target_S, gain_S, grow_S = (np.concatenate(part) for part in zip(*steps, strict=True))
    return unit_S, target_S, gain_S, grow_S


def _search(cost_UC: Floats, problem: AllocationProgram) -> Choices:
    """The best plan that exchanges reach from several starts."""
    best_U = smallest_choices(cost_UC, problem.size_UC)
    smallest = size_of(problem, best_U)
    # Of these costs: choices that floors rule out would make the bound too low to stop at.
    bound = _relax(cost_UC, problem)[1]
    for kept in KEPT:
        start = replace(problem, capacity=max(smallest, int((1 - kept) * problem.capacity)))
        choice_U = _exchange(cost_UC, problem, _relax(cost_UC, start)[0], bound)
        best_U = min(best_U, choice_U, key=lambda choices: cost_of(problem, choices))
        if cost_of(problem, best_U) - bound <= GOOD_ENOUGH * abs(bound):
            break
    return best_U


def _exchange(cost_UC: Floats, problem: AllocationProgram, choice_U: Choices, bound: float) -> Choices:
    """Change one unit, or two against each other, by the best move within the budget until none lowers the damage."""
    choice_U = choice_U.copy()
    room = problem.capacity - size_of(problem, choice_U)
    for _ in range(MAX_EXCHANGES):
        if cost_of(problem, choice_U) - bound <= CLOSE_ENOUGH * abs(bound):
            break
        move = _best_move(cost_UC, problem.size_UC, choice_U, room)
        if move is None:
            break
        for unit, target in move:
            room -= int(problem.size_UC[unit, target] - problem.size_UC[unit, choice_U[unit]])
            choice_U[unit] = target
    return choice_U


def _best_move(
    cost_UC: Floats, size_UC: NDArray[np.int64], choice_U: Choices, room: int
) -> list[tuple[int, int]] | None:
    """The change of one or two units that lowers the damage most and keeps the budget; None where there is none."""
    rows = np.arange(len(cost_UC))
    change_UC = cost_UC - cost_UC[rows, choice_U][:, None]
    grow_UC = size_UC - size_UC[rows, choice_U][:, None]
    possible = np.isfinite(cost_UC)
    possible[rows, choice_U] = False
    unit_M, target_M = possible.nonzero()
    order = np.argsort(grow_UC[unit_M, target_M], kind="stable")
    unit_M, target_M = unit_M[order], target_M[order]
    change_M, grow_M = change_UC[unit_M, target_M], grow_UC[unit_M, target_M]
    if not len(change_M):
        return None
    # partner_M[i]: the cheapest of the i + 1 smallest moves.
    lowest_M = np.minimum.accumulate(change_M)
    partner_M = np.maximum.accumulate(np.where(change_M == lowest_M, np.arange(len(change_M)), 0))
    fitting_M = np.searchsorted(grow_M, room - grow_M, side="right") - 1
    partner_of_M = partner_M[np.maximum(fitting_M, 0)]
    pair = (fitting_M >= 0) & (unit_M[partner_of_M] != unit_M)
    pair_change_M = np.where(pair, change_M + change_M[partner_of_M], np.inf)
    single_change_M = np.where(grow_M <= room, change_M, np.inf)
    best_pair, best_single = int(pair_change_M.argmin()), int(single_change_M.argmin())
    tolerance = -1e-12 * max(1e-300, float(np.abs(cost_UC[rows, choice_U]).sum()))
    if min(pair_change_M[best_pair], single_change_M[best_single]) >= tolerance:
        return None
    if single_change_M[best_single] <= pair_change_M[best_pair]:
        return [(int(unit_M[best_single]), int(target_M[best_single]))]
    return [(int(unit_M[i]), int(target_M[i])) for i in (best_pair, int(partner_of_M[best_pair]))]


def meet_floors(problem: AllocationProgram, price: float) -> Floats:
    """Costs in which the experts that meet each floor most cheaply at a price can have only its wide choices."""
    cost_UC = problem.cost_UC.copy()
    for group in problem.floors:
        extras = _extras(group, cost_UC, problem.size_UC, price)
        for index in np.argsort(extras, kind="stable")[: group.num_experts]:
            cost_UC[np.ix_(np.array(group.experts[index]), ~group.allowed_C)] = np.inf
    return cost_UC


def _values(cost_UC: Floats, size_UC: NDArray[np.int64], price: float) -> Floats:
    """Cost and size at a price; an infinite one asks for size alone."""
    weight, scale = (0.0, 1.0) if np.isinf(price) else (1.0, price)
    finite = np.isfinite(cost_UC)
    return np.where(finite, weight * np.where(finite, cost_UC, 0) + scale * size_UC, np.inf)


def _extras(group: FloorGroup, cost_UC: Floats, size_UC: NDArray[np.int64], price: float) -> list[float]:
    """What it adds to cost and size at a price of each expert of a floor to keep to the wide choices."""
    units = sorted({unit for members in group.experts for unit in members})
    value = _values(cost_UC[units], size_UC[units], price)
    extra = np.where(group.allowed_C, value, np.inf).min(1) - value.min(1)
    extra_of = dict(zip(units, extra.tolist(), strict=True))
    return [sum(extra_of[unit] for unit in members) for members in group.experts]


def _floor_bound(problem: AllocationProgram, price: float) -> float:
    """A bound by the Lagrangian at a price: ``cost + price (size - capacity)`` of any plan that keeps the floors.

    Of floors that share units only the one that adds most counts, and of experts that share units (all of a block,
    where they have one width) only the dearest that is needed.
    """
    value_UC = _values(problem.cost_UC, problem.size_UC, price)
    added: list[tuple[set[int], float]] = []  # units of some floors, and what these add at least
    for group in problem.floors:
        needed = sorted(_extras(group, problem.cost_UC, problem.size_UC, price))[: group.num_experts]
        units = {unit for members in group.experts for unit in members}
        apart = len(units) == sum(map(len, group.experts))
        sharing = [other for other in added if not units.isdisjoint(other[0])]
        added = [other for other in added if units.isdisjoint(other[0])]
        most = max([sum(needed) if apart else max(needed, default=0.0), *(extra for _, extra in sharing)])
        added.append((units.union(*(others for others, _ in sharing)), most))
    return float(value_UC.min(1).sum()) - price * problem.capacity + sum(extra for _, extra in added)
