"""Bit allocation as one 0/1 program over the whole model.

    minimise    sum_uc cost_uc x_uc
    subject to  sum_c x_uc = 1 for every unit u,     sum_uc size_uc x_uc <= capacity,
                in every block at least n experts with all linears at b bits or more (for every floor)

A unit is what the runtime gives one width (``runtime.py``), a choice is bits and group size.  Costs are additive
predictions of damage; sizes are whole numbers, so that a budget is kept exactly.

Shapes: U units, C choices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice, storage_bits
from moeq.allocation.runtime import find_runtime, shared_width_units
from moeq.quant.spec import GridSpec, WeightShape

BudgetUnit = Literal["code_bits", "average_bits", "bytes", "active_bytes"]


@dataclass(frozen=True)
class Budget:
    """How much a plan may take.

    Attributes:
        value: The limit.
        unit: "code_bits": bits per weight, codes only; "average_bits": with scales and zero points; "bytes": of all
            weights; "active_bytes": of the weights that one token uses.
    """

    value: float
    unit: BudgetUnit = "code_bits"


@dataclass(frozen=True)
class Floor:
    """In every block with routed experts, at least ``num_experts`` have ``bits`` or more in all their linears."""

    bits: int
    num_experts: int


@dataclass(frozen=True)
class Constraints:
    """What a plan is made of and has to keep to.

    Attributes:
        choices: Bits and group sizes that a weight may get; those that the runtime cannot read are left out.
        budget: The limit, over all weights, fixed ones included.
        like: Grid whose symmetry (which decides the overhead) and clip search the chosen grids have.
        runtime: A name of ``runtime.RUNTIMES``: which weights share a width.
        floors: Experts of each block that must stay wide.
        minimum_bits: Least bits of some weights, by name.
        fixed: Grids of weights that are not to be chosen, by name.
        group_sizes: The only group size of some weights, by name; None is one scale per channel.
    """

    choices: Sequence[Choice]
    budget: Budget
    like: GridSpec
    runtime: str = "research"
    floors: Sequence[Floor] = ()
    minimum_bits: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, GridSpec] = field(default_factory=dict)
    group_sizes: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FloorGroup:
    """A floor of one block: at least ``num_experts`` of ``experts`` (units of each) keep to ``allowed_C``."""

    allowed_C: NDArray[np.bool_]
    num_experts: int
    experts: tuple[tuple[int, ...], ...]


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
        ValueError: No choice fits a unit, a cost is missing or not finite, or a floor cannot be met by any plan.
    """
    choices, budget, fixed = constraints.choices, constraints.budget, constraints.fixed
    runtime = find_runtime(constraints.runtime)
    readable = tuple(sorted({choice for choice in choices if runtime.admits(choice)}))
    if not readable:
        raise ValueError(f"{runtime.name} reads none of the choices {', '.join(c.label for c in choices)}; give others")
    units = shared_width_units([w for w in weights if w.name not in fixed], runtime)
    shape = len(units), len(readable)
    cost_UC, size_UC = np.full(shape, np.inf), np.zeros(shape, np.int64)
    denominator = _denominator(weights) if budget.unit == "active_bytes" else 1
    for row, unit in enumerate(units):
        least = max(constraints.minimum_bits.get(weight.name, 0) for weight in unit)
        for column, choice in enumerate(readable):
            if choice.bits >= least and all(_fits(weight, choice, constraints.group_sizes) for weight in unit):
                cost_UC[row, column] = sum(_cost(costs, weight, choice) for weight in unit)
                size_UC[row, column] = sum(
                    _size(w, choice.grid(constraints.like), budget.unit, denominator) for w in unit
                )
        if not np.isfinite(cost_UC[row]).any():
            raise ValueError(
                f"{unit[0].name}: none of the choices {', '.join(c.label for c in readable)} has at least {least} bits "
                f"and a group size that divides its in_features ({unit[0].in_features}){_asked(unit, constraints)}; "
                "add one"
            )
    fixed_size = sum(_size(w, fixed[w.name], budget.unit, denominator) for w in weights if w.name in fixed)
    # Bytes are counted in bits; an average over N weights in bits of the whole model.
    parts = sum(w.numel for w in weights) if budget.unit in ("code_bits", "average_bits") else 8 * denominator
    capacity = math.floor(budget.value * parts * (1 + 1e-12)) - fixed_size
    # The widest first, as experts that meet it also meet the others.
    ordered = sorted(constraints.floors, key=lambda floor: -floor.bits)
    groups = tuple(group for floor in ordered for group in _floor_groups(floor, weights, units, readable, cost_UC))
    return AllocationProgram(tuple(units), readable, cost_UC, size_UC, capacity, parts, budget, fixed_size, groups)


def _fits(weight: WeightShape, choice: Choice, group_sizes: Mapping[str, int | None]) -> bool:
    divides = choice.group_size is None or weight.in_features % choice.group_size == 0
    return divides and group_sizes.get(weight.name, choice.group_size) == choice.group_size


def _asked(unit: Sequence[WeightShape], constraints: Constraints) -> str:
    """The group sizes that patterns ask for, in words; empty where they ask for none."""
    sizes = {constraints.group_sizes[weight.name] for weight in unit if weight.name in constraints.group_sizes}
    return f", which the patterns want to be {' and '.join(str(size or 0) for size in sizes)}" if sizes else ""


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


def _size(weight: WeightShape, grid: GridSpec, unit: BudgetUnit, denominator: int) -> int:
    codes, overhead = storage_bits(weight, grid)
    if unit == "code_bits":
        return codes
    if unit == "active_bytes":
        return int((codes + overhead) * _share(weight) * denominator)
    return codes + overhead


def _share(weight: WeightShape) -> Fraction:
    """The active share k / E, exactly."""
    return Fraction(weight.active_share).limit_denominator(1 << 14)


def _denominator(weights: Sequence[WeightShape]) -> int:
    return math.lcm(*{_share(weight).denominator for weight in weights})


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
