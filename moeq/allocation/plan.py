"""A plan: which grid each weight gets, what it costs in bits and bytes, and its JSON form.

    code bits = sum_w bits_w numel_w / sum_w numel_w,     average bits = the same with scales and zero points,
    active    = the same with every weight counted by the share of tokens that use it (top-k of E for routed experts)

Published averages (QuantMoE-Bench, MC-MoE, GEMQ) are code bits; files and memory follow the average bits.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import total_ordering
from pathlib import Path
from typing import Any

from moeq.quant.spec import GridSpec, WeightShape

PLAN_VERSION = 1
# What a weight may get where a run does not say: bits, in groups of the model's group_size.
DEFAULT_CHOICES: tuple[int | str, ...] = (2, 3, 4, 8)


@total_ordering
@dataclass(frozen=True)
class Choice:
    """What an allocator can give to a weight; ordered by size: by bits, then finer groups above coarser ones.

    Attributes:
        bits: Bits per code.
        group_size: In-features that share a scale; None is one scale per output channel.
    """

    bits: int
    group_size: int | None = None

    def __lt__(self, other: "Choice") -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[int, float]:
        return self.bits, 0.0 if self.group_size is None else 1.0 / self.group_size

    @property
    def label(self) -> str:
        """Bits, and the group size where there are groups: "4", "4g64"."""
        return f"{self.bits}" if self.group_size is None else f"{self.bits}g{self.group_size}"

    @classmethod
    def from_label(cls, label: str) -> "Choice":
        """The inverse of ``label``, "4g0" being "4"; raises ValueError for any other text."""
        bits, separator, group_size = label.partition("g")
        if not bits.isdecimal() or (separator and not group_size.isdecimal()):
            raise ValueError(f"choice ({label!r}) must be bits or bits and group size; write '4' or '4g64'")
        return cls(int(bits), int(group_size or 0) or None)

    def grid(self, like: GridSpec) -> GridSpec:
        """The grid of this choice, symmetric and clipped as ``like``."""
        return replace(like, bits=self.bits, group_size=self.group_size)


def parse_choices(entries: Sequence[int | str], group_size: int | None) -> tuple[Choice, ...]:
    """Choices of a configuration, each once, in increasing order.

    Args:
        entries: Bits, in groups of ``group_size``, or labels such as "4g128" and "4g0" (no groups).
        group_size: That of the model.

    Raises:
        ValueError: An entry is neither.
    """
    labels = map(str, entries)
    return tuple(sorted({Choice(int(e), group_size) if e.isdecimal() else Choice.from_label(e) for e in labels}))


@dataclass(frozen=True)
class PlanCost:
    """Exact cost of a plan over its weights.

    Attributes:
        code_bits: Bits per weight, codes only.
        average_bits: Bits per weight with scales and zero points.
        active_code_bits: Bits of codes per weight that one token uses.
        active_average_bits: The same with scales and zero points.
        bytes: Codes, scales and zero points of all weights.
        active_bytes: Those that one token uses.
    """

    code_bits: float
    average_bits: float
    active_code_bits: float
    active_average_bits: float
    bytes: int
    active_bytes: int


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
        close = get_close_matches(unknown[0], shapes, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "fix the names"
        raise ValueError(f"the plan names {len(unknown)} weights the model lacks, first {unknown[0]!r}; {remedy}")
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
    return weight.numel * grid.bits, num_groups * (scale_bits + (0 if grid.symmetric else grid.bits))


def plan_cost(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape], scale_bits: int = 16) -> PlanCost:
    """Bits per weight (codes only and with overhead, all and active weights) and bytes of a plan."""
    codes = overhead = numel = 0
    active_codes = active_overhead = active_numel = 0.0
    for weight in weights:
        code_bits, extra = storage_bits(weight, plan[weight.name], scale_bits)
        codes, overhead, numel = codes + code_bits, overhead + extra, numel + weight.numel
        active_codes += weight.active_share * code_bits
        active_overhead += weight.active_share * extra
        active_numel += weight.active_share * weight.numel
    return PlanCost(
        code_bits=codes / numel,
        average_bits=(codes + overhead) / numel,
        active_code_bits=active_codes / active_numel,
        active_average_bits=(active_codes + active_overhead) / active_numel,
        bytes=(codes + overhead + 7) // 8,
        active_bytes=math.ceil((active_codes + active_overhead) / 8),
    )


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
        return {name: _grid_from_json(name, grid) for name, grid in data["weights"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an allocation that moeq can read: {error}") from error


def _grid_from_json(name: str, grid: Mapping[str, Any]) -> GridSpec:
    """A grid; errors name the weight, as a plan may have been edited by hand."""
    try:
        return GridSpec(**grid)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
