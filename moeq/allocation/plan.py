"""A plan: which grid each weight gets, what it costs in bits and bytes, and its JSON form.

Bits are reported honestly: ``average_bits`` counts scales and zero points, ``code_bits`` does not; the average over
active weights counts the routed experts of a block by the share that one token uses (top-k of E).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeq.quant.spec import GridSpec

PLAN_VERSION = 1


@dataclass(frozen=True)
class WeightShape:
    """A weight as the allocator sees it.

    Attributes:
        name: Canonical name.
        kind: "attention", "dense", "shared" or "routed".
        out_features: O.
        in_features: I.
        active_share: Share of tokens for which the weight is used: top-k / E for routed experts, else 1.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    active_share: float = 1.0


@dataclass(frozen=True)
class PlanCost:
    """Exact cost of a plan over its weights; bits per weight, and bytes of codes, scales and zero points."""

    code_bits: float
    average_bits: float
    active_average_bits: float
    bytes: int


def uniform_plan(
    weights: Iterable[WeightShape], grid: GridSpec, bits_by_kind: Mapping[str, int] | None = None
) -> dict[str, GridSpec]:
    """The same grid for every weight, with other bits for some kinds.

    Raises:
        ValueError: A group size does not divide a weight's in-features, named with the weight.
    """
    overrides = bits_by_kind or {}
    plan = {w.name: replace(grid, bits=overrides.get(w.kind, grid.bits)) for w in weights}
    check_plan(plan, weights)
    return plan


def check_plan(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape]) -> None:
    """Raise ValueError for a missing or unknown weight, or a group size that does not fit a weight's shape."""
    shapes = {w.name: w for w in weights}
    unknown, missing = sorted(plan.keys() - shapes.keys()), sorted(shapes.keys() - plan.keys())
    if unknown:
        raise ValueError(f"the plan names {len(unknown)} weights the model lacks, first {unknown[0]!r}; fix the names")
    if missing:
        raise ValueError(f"the plan lacks {len(missing)} weights of the model, first {missing[0]!r}; add them")
    for name, grid in plan.items():
        try:
            grid.num_groups(shapes[name].in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def storage_bits(weight: WeightShape, grid: GridSpec, scale_bits: int = 16) -> tuple[int, int]:
    """Bits of the codes, and of scales and zero points, of one weight."""
    num_groups = weight.out_features * grid.num_groups(weight.in_features)
    codes = weight.out_features * weight.in_features * grid.bits
    return codes, num_groups * (scale_bits + (0 if grid.symmetric else grid.bits))


def plan_cost(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape], scale_bits: int = 16) -> PlanCost:
    """Average bits per weight (codes only, with overhead, over active weights) and total bytes."""
    codes = overhead = numel = 0
    active_bits = active = 0.0
    for weight in weights:
        code_bits, extra = storage_bits(weight, plan[weight.name], scale_bits)
        size = weight.out_features * weight.in_features
        codes, overhead, numel = codes + code_bits, overhead + extra, numel + size
        active_bits += weight.active_share * (code_bits + extra)
        active += weight.active_share * size
    return PlanCost(codes / numel, (codes + overhead) / numel, active_bits / active, (codes + overhead + 7) // 8)


def plan_to_json(plan: Mapping[str, GridSpec], cost: PlanCost) -> dict[str, Any]:
    """JSON form of a plan; ``plan_from_json`` reads it back."""
    return {"version": PLAN_VERSION, **asdict(cost), "weights": {name: asdict(grid) for name, grid in plan.items()}}


def plan_from_json(path: Path) -> dict[str, GridSpec]:
    """Read a plan; raises ValueError for another version, a missing table, or a field that is not a grid's."""
    if not path.is_file():
        raise ValueError(f"no allocation file at {path}; give the allocation.json of an earlier run")
    try:
        data = json.loads(path.read_text(encoding="utf8"))
        if data["version"] != PLAN_VERSION:
            raise ValueError(f"version ({data['version']}) must be {PLAN_VERSION}")
        return {name: GridSpec(**grid) for name, grid in data["weights"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an allocation that moeq can read: {error}") from error
