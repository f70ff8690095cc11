"""What a plan takes in the files of a runtime, whose types may be wider than the grids that they hold."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from moeq.allocation.constraints import Budget
from moeq.allocation.plan import Choice, PlanCost, plan_cost, planned
from moeq.allocation.runtime import Runtime
from moeq.allocation.time_table import TimeTable, plan_milliseconds
from moeq.quant.carrier import CarrierMode
from moeq.quant.spec import GridSpec, WeightShape


def file_cost(
    plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], runtime: Runtime, mode: CarrierMode = "exact"
) -> PlanCost:
    """Exact cost of a plan in a runtime's files: bits of codes are the plan's, all else is what the file holds.

    Args:
        plan: Grids by name; weights that it lacks count for nothing.
        weights: All quantizable weights.
        runtime: Whose files; research is moeq's packed folder, as ``plan_cost`` has it.
        mode: Of the carriers.

    Raises:
        ValueError: A weight's grid has no type there.
    """
    cost = plan_cost(plan, weights)
    if runtime.format is None:
        return cost
    bits = numel = 0
    active_bits = active_numel = 0.0
    for weight in planned(plan, weights):
        taken = runtime.file_bits(weight, plan[weight.name], mode)
        bits, numel = bits + taken, numel + weight.numel
        active_bits += weight.active_share * taken
        active_numel += weight.active_share * weight.numel
    return replace(
        cost,
        average_bits=bits / numel,
        active_average_bits=active_bits / active_numel,
        bytes=(bits + 7) // 8,
        active_bytes=math.ceil(active_bits / 8),
    )


def file_types(
    plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], runtime: Runtime, mode: CarrierMode = "exact"
) -> dict[str, int]:
    """How many weights of a plan have which type in a runtime's files; empty for research."""
    if runtime.format is None:
        return {}
    carriers = (runtime.carrier(plan[w.name], w.in_features, mode) for w in planned(plan, weights))
    return dict(sorted(Counter(carrier.name for carrier in carriers).items()))


def check_budget(
    plan: Mapping[str, GridSpec], weights: Sequence[WeightShape], budget: Budget, runtime: Runtime, mode: CarrierMode,
    times: TimeTable | None = None,
) -> None:  # fmt: skip
    """Raise ValueError where a plan takes more than a budget, in the files of a runtime or by a table of times."""
    if budget.unit == "milliseconds":
        assert times is not None
        takes = plan_milliseconds(plan, weights, times)
    else:
        takes = getattr(file_cost(plan, weights, runtime, mode), budget.unit)
    if takes > budget.value * (1 + 1e-12):
        files = "" if runtime.format is None else f" in files for {runtime.name} ({mode})"
        raise ValueError(
            f"the plan takes {takes:.6g} {budget.unit}{files} where the budget is {budget.value:.6g}; "
            f"give some weights fewer bits, or a budget of {takes:.6g}"
        )


def symmetry_note(grids: Iterable[tuple[WeightShape, GridSpec]], runtime: Runtime, mode: CarrierMode = "exact") -> str:
    """One line where asymmetric grids need wider types than symmetric ones of the same bits; empty where none does.

    A symmetric type holds an asymmetric grid with one bit more (``moeq.quant.carrier``).

    Args:
        grids: Weights with what they have or may get.
        runtime: Whose files.
        mode: Of the carriers.
    """
    found: dict[str, str] = {}
    for weight, grid in grids if runtime.format is not None else ():
        even, size = GridSpec(grid.bits, grid.group_size, symmetric=True), (weight.out_features, weight.in_features)
        label = Choice.of(grid).label
        if grid.symmetric or grid.is_named or label in found or not runtime.holds(even, weight.in_features, mode):
            continue
        cheaper, takes = runtime.carrier(even, weight.in_features, mode), "no type"
        if runtime.holds(grid, weight.in_features, mode):
            carrier = runtime.carrier(grid, weight.in_features, mode)
            if carrier.bits <= cheaper.bits:
                continue
            takes = f"{carrier.num_bits(*size) / weight.numel:.4g}"
        found[label] = f"{label} {takes} (symmetric {cheaper.num_bits(*size) / weight.numel:.4g})"
    if not found:
        return ""
    return (
        f"asymmetric grids take more bits per weight than symmetric ones in files for {runtime.name} ({mode}): "
        f"{', '.join(found.values())}; --model.grid full_range is smaller"
    )
