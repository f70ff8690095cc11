"""Bit allocation as one 0/1 program over the whole model.

    minimise    sum_uc cost_uc x_uc
    subject to  sum_c x_uc = 1 for every unit u,     sum_uc size_uc x_uc <= capacity,
                in every block at least n experts with all linears at b bits or more (for every floor),
                sum_uc time_uc x_uc <= capacity of time (where there is a limit of time beside the budget)

A unit is what the runtime gives one type (``runtime.py``), a choice is bits and group size.  Costs are additive
predictions of damage; sizes are those of the runtime's files (or times, of products), in whole numbers, so that a
budget is kept exactly.

Shapes: U units, C choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeq.allocation.constraints import Budget, BudgetUnit, Constraints, Floor
from moeq.allocation.evidence import CostTable
from moeq.allocation.offer import PER_MILLISECOND, Offer, share_denominator
from moeq.allocation.plan import Choice
from moeq.allocation.runtime import shared_width_units
from moeq.quant.spec import WeightShape


@dataclass(frozen=True)
class FloorGroup:
    """A floor of one block: at least ``num_experts`` of ``experts`` (units of each) keep to ``allowed_C``."""

    allowed_C: NDArray[np.bool_]
    num_experts: int
    experts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TimeLimit:
    """A limit of time beside the budget, all in nanoseconds.

    Attributes:
        time_UC: Of one token, int64.
        capacity: What the units may take.
        fixed: What weights outside the program take.
    """

    time_UC: NDArray[np.int64]
    capacity: int
    fixed: int

    def milliseconds(self, time: int) -> float:
        """Of the units' time, fixed weights included."""
        return (time + self.fixed) / PER_MILLISECOND


@dataclass(frozen=True)
class AllocationProgram:
    """The program in arrays.

    Attributes:
        units: Weights of each unit.
        choices: What a unit may get, from small to large.
        cost_UC: Predicted damage, float64; inf where a unit cannot have a choice.
        size_UC: What it takes, int64, in parts of the budget unit.
        capacity: The budget in the same parts, less what fixed weights take.
        parts: Parts per unit of budget (of an average: per bit per weight).
        budget: The budget itself, for messages.
        fixed_size: Parts that weights outside the program take.
        floors: Floors by block.
        runtime: For messages: whose files.
        note: For messages: what would make them smaller, or nothing.
        limit: A second limit, of time.
    """

    units: tuple[tuple[WeightShape, ...], ...]
    choices: tuple[Choice, ...]
    cost_UC: NDArray[np.float64]
    size_UC: NDArray[np.int64]
    capacity: int
    parts: int
    budget: Budget
    fixed_size: int
    floors: tuple[FloorGroup, ...]
    runtime: str = "research"
    note: str = ""
    limit: TimeLimit | None = None

    def amount(self, size: int) -> float:
        """A size of the units in the unit of the budget, fixed weights included."""
        return (size + self.fixed_size) / self.parts


def build_problem(weights: Sequence[WeightShape], costs: CostTable, constraints: Constraints) -> AllocationProgram:
    """The program of a model.

    Args:
        weights: All quantizable weights.
        costs: Predicted damage by weight and choice.
        constraints: What a plan has to keep to.

    Raises:
        ValueError: No choice fits a unit, the runtime cannot read a fixed weight, a cost is missing or not finite, or a
            floor cannot be met by any plan.
    """
    budget, fixed = constraints.budget, constraints.fixed
    offer = Offer.of(weights, constraints)
    choices = offer.choices
    units = shared_width_units([w for w in weights if w.name not in fixed], offer.runtime)
    cost_UC = np.full((len(units), len(choices)), np.inf)
    for row, unit in enumerate(units):
        for column, choice in enumerate(choices):
            if all(offer.fits(weight, choice) for weight in unit):
                cost_UC[row, column] = sum(_cost(costs, weight, choice) for weight in unit)
        if not np.isfinite(cost_UC[row]).any():
            raise ValueError(offer.refusal(unit))
    denominator = share_denominator(weights) if budget.unit == "active_bytes" else 1
    size_UC, fixed_size = _sizes(offer, weights, units, cost_UC, budget.unit, denominator)
    # Bytes are counted in bits; an average over N weights in bits of the whole model.
    parts = PER_MILLISECOND if budget.unit == "milliseconds" else 8 * denominator
    if budget.unit in ("code_bits", "average_bits"):
        parts = sum(w.numel for w in weights)
    limit = None
    if constraints.milliseconds is not None:
        time_UC, fixed_time = _sizes(offer, weights, units, cost_UC, "milliseconds", 1)
        limit = TimeLimit(time_UC, math.floor(constraints.milliseconds * PER_MILLISECOND) - fixed_time, fixed_time)
    capacity = math.floor(budget.value * parts * (1 + 1e-12)) - fixed_size
    # The widest first, as experts that meet it also meet the others.
    ordered = sorted(constraints.floors, key=lambda floor: -floor.bits)
    groups = tuple(group for floor in ordered for group in _floor_groups(floor, weights, units, choices, cost_UC))
    return AllocationProgram(
        tuple(units), choices, cost_UC, size_UC, capacity, parts, budget, fixed_size, groups, constraints.runtime,
        offer.note(weights), limit,
    )  # fmt: skip


def _sizes(
    offer: Offer, weights: Sequence[WeightShape], units: Sequence[tuple[WeightShape, ...]],
    cost_UC: NDArray[np.float64], unit: BudgetUnit, denominator: int,
) -> tuple[NDArray[np.int64], int]:  # fmt: skip
    """What units take with each choice that they can have, and weights outside the program, in parts of a unit."""
    size_UC = np.zeros(cost_UC.shape, np.int64)
    for row, column in zip(*np.isfinite(cost_UC).nonzero(), strict=True):
        grid = offer.grids[offer.choices[column]]
        size_UC[row, column] = sum(offer.size(weight, grid, unit, denominator) for weight in units[row])
    fixed = offer.constraints.fixed
    return size_UC, sum(offer.size(w, fixed[w.name], unit, denominator) for w in weights if w.name in fixed)


def _cost(costs: CostTable, weight: WeightShape, choice: Choice) -> float:
    try:
        cost = costs[weight.name][choice]
    except KeyError:
        raise ValueError(
            f"the cost table has no {choice.label} for {weight.name}; add it to choices of the callback Survey"
        ) from None
    if not math.isfinite(cost):
        raise ValueError(f"cost ({cost}) of {weight.name} at {choice.label} must be finite; check the survey's data")
    return cost


def _floor_groups(
    floor: Floor, weights: Sequence[WeightShape], units: Sequence[tuple[WeightShape, ...]],
    choices: Sequence[Choice], cost_UC: NDArray[np.float64],
) -> list[FloorGroup]:  # fmt: skip
    """A floor by block, over the experts whose weights are to be chosen."""
    allowed_C = np.array([choice.bits >= floor.bits for choice in choices])
    unit_of = {weight.name: index for index, unit in enumerate(units) for weight in unit}
    experts: dict[int, dict[int, set[int]]] = {}
    for weight in weights:
        if weight.expert is not None and weight.name in unit_of:
            experts.setdefault(weight.block, {}).setdefault(weight.expert, set()).add(unit_of[weight.name])
    groups = []
    for block, members in experts.items():
        able = [tuple(sorted(u)) for u in members.values() if np.isfinite(cost_UC[list(u)][:, allowed_C]).any(1).all()]
        if len(able) < floor.num_experts:
            raise ValueError(
                f"floor: {floor.num_experts} experts at {floor.bits} bits in block {block}, where {len(able)} of "
                f"{len(members)} can have them; lower num_experts or add a choice of {floor.bits} bits"
            )
        groups.append(FloorGroup(allowed_C, floor.num_experts, tuple(able)))
    return groups
