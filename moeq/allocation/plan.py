"""A plan: which grid each weight gets, what it costs in bits and bytes, and its JSON form.

    code bits = sum_w bits_w numel_w / sum_w numel_w,     average bits = the same with scales and zero points,
    active    = the same with every weight counted by the share of tokens that use it (top-k of E for routed experts)

Published averages (QuantMoE-Bench, MC-MoE, GEMQ) are code bits; files and memory follow the average bits.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import total_ordering
from pathlib import Path
from typing import Any

from moeq.allocation.patterns import UNIFORM_BESIDE_TWO_LEVEL, Wish, kinds_of
from moeq.quant.kinds import NAMED, StoredKind
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
        kind: Of the grid; bits and group size follow from one with a name (``of_kind``).
    """

    bits: int
    group_size: int | None = None
    kind: StoredKind = "uniform"

    @classmethod
    def of(cls, grid: GridSpec) -> "Choice":
        """That of a grid."""
        return cls(grid.bits, grid.group_size, grid.stored_kind)

    def __lt__(self, other: "Choice") -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[int, float, str]:
        return self.bits, 0.0 if self.group_size is None else 1.0 / self.group_size, self.kind

    @property
    def label(self) -> str:
        """Bits, and the group size where there are groups: "4", "4g64"; the name of a grid that has one: "q4_k"."""
        if self.kind != "uniform":
            return self.kind
        return f"{self.bits}" if self.group_size is None else f"{self.bits}g{self.group_size}"

    @classmethod
    def from_label(cls, label: str) -> "Choice":
        """The inverse of ``label``, "4g0" being "4"; raises ValueError for any other text."""
        if label in NAMED:
            return cls.of(GridSpec.of_kind(label))  # type: ignore[arg-type]
        bits, separator, group_size = label.partition("g")
        if not bits.isdecimal() or (separator and not group_size.isdecimal()):
            raise ValueError(
                f"choice ({label!r}) must be bits, bits and group size, or a grid's name; write '4', '4g64', 'q4_k'"
            )
        return cls(int(bits), int(group_size or 0) or None)

    def grid(self, like: GridSpec) -> GridSpec:
        """The grid of this choice; symmetric or full-range, unless its kind or one bit says, and clipped as another."""
        if self.kind != "uniform":
            return GridSpec.of_kind(self.kind, clip_search=like.clip_search)
        kind = "uniform" if like.is_named else like.kind
        return GridSpec(like.bits, self.group_size, like.symmetric, like.clip_search, kind).with_bits(self.bits)

    def fits(self, in_features: int) -> bool:
        """Whether rows of so many weights divide into its groups, or super-blocks."""
        unit = self.grid(GridSpec()).unit
        return unit is None or in_features % unit == 0


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
    weights: Iterable[WeightShape],
    grid: GridSpec,
    bits_by_kind: Mapping[str, int] | None = None,
    wishes: Mapping[str, Wish] | None = None,
) -> dict[str, GridSpec]:
    """The same grid for every weight, with other bits for some kinds, and what patterns say of single weights.

    Args:
        weights: All quantizable weights.
        grid: Of those of which nothing else is said.
        bits_by_kind: Bits of some structures.
        wishes: What patterns say, by name; weights that are kept are not in the plan.

    Raises:
        ValueError: Group sizes do not divide the in-features of some weights, all of which are named.
    """
    overrides, said = bits_by_kind or {}, wishes or {}
    by_kind = {w.name: grid.with_bits(overrides.get(w.kind, grid.bits)) for w in weights}
    kept = {name for name, wish in said.items() if wish.keep}
    plan = {
        name: said[name].grid(usual) if name in said else usual for name, usual in by_kind.items() if name not in kept
    }
    check_plan(plan, weights, kept)
    return plan


def check_plan(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape], kept: Collection[str] = ()) -> None:
    """Raise ValueError for missing or unknown weights, or group sizes that do not fit the shapes of weights.

    Args:
        plan: Grids by name.
        weights: All quantizable weights.
        kept: Names of those that stay as they are, which a plan must lack.
    """
    shapes = {w.name: w for w in weights}
    if both := sorted(plan.keys() & set(kept)):
        raise ValueError(f"the plan has a grid for {both[0]} and keeps it, too; take it out of one of the two")
    unknown = sorted((plan.keys() | set(kept)) - shapes.keys())
    missing = sorted(shapes.keys() - plan.keys() - set(kept))
    if unknown:
        close = get_close_matches(unknown[0], shapes, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "fix the names"
        raise ValueError(f"the plan names {len(unknown)} weights the model lacks, first {unknown[0]!r}; {remedy}")
    if missing:
        raise ValueError(f"the plan lacks {len(missing)} weights of the model, first {missing[0]!r}; add them")
    _check_groups(plan, shapes)


def _check_groups(plan: Mapping[str, GridSpec], shapes: Mapping[str, WeightShape]) -> None:
    """Name all weights whose in-features their groups or super-blocks do not divide, by shape, and the ways out."""
    misfits: dict[StoredKind, dict[int, list[str]]] = {}
    sizes = set()
    for name, grid in plan.items():
        size, in_features = grid.unit, shapes[name].in_features
        if size is not None and in_features % size:
            misfits.setdefault(grid.stored_kind, {}).setdefault(in_features, []).append(name)
            sizes.add(size)
    for kind, of_kind in misfits.items():
        if kind != "uniform":
            raise ValueError(_named_misfits(kind, of_kind))
    if not misfits:
        return
    found = misfits["uniform"]
    divisors = [d for d in (16, 32, 64, 128) if not any(in_features % d for in_features in found)]
    choice = f"one of {divisors} or null" if divisors else "null (one group per channel)"
    pattern, in_features = _first_pattern(found)
    example = next((d for d in (128, 64, 32, 16) if in_features % d == 0), 0)
    raise ValueError(
        f"group_size ({', '.join(map(str, sorted(sizes)))}) must divide in_features; it does not divide "
        f"{', nor '.join(_by_shape(found))}; choose {choice} for the model, or for these weights alone by patterns of "
        f"BitAllocation: [{{pattern: '{pattern}', group_size: {example}}}]"
    )


def _named_misfits(kind: StoredKind, found: Mapping[int, list[str]]) -> str:
    pattern, in_features = _first_pattern(found)
    remedy = f"bits: 4, group_size: {UNIFORM_BESIDE_TWO_LEVEL}"
    if in_features % UNIFORM_BESIDE_TWO_LEVEL:
        remedy = "keep: true"
    return (
        f"grid ({kind}) needs in_features in multiples of {GridSpec.of_kind(kind).unit}, which are not "
        f"{', nor '.join(_by_shape(found))}; give these weights a grid of their own by patterns of "
        f"BitAllocation: [{{pattern: '{pattern}', {remedy}}}]"
    )


def _by_shape(found: Mapping[int, list[str]]) -> list[str]:
    """Such as "128 of model.layers.*.mlp.experts.*.down_proj (64 x)", for each number of in-features."""
    return [
        f"{size} of {', '.join(kind + (f' ({num} x)' if num > 1 else '') for kind, num in kinds_of(names).items())}"
        for size, names in found.items()
    ]


def _first_pattern(found: Mapping[int, list[str]]) -> tuple[str, int]:
    """A pattern of the first weights, or the name of the only one, and their in-features."""
    in_features, names = next(iter(found.items()))
    return (next(iter(kinds_of(names))) if len(names) > 1 else names[0]), in_features


def planned(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape]) -> list[WeightShape]:
    """The weights that a plan quantizes."""
    return [weight for weight in weights if weight.name in plan]


def storage_bits(weight: WeightShape, grid: GridSpec, scale_bits: int = 16) -> tuple[int, int]:
    """Bits of the codes, and of scales and zero points, of one weight."""
    return weight.numel * grid.bits, weight.out_features * grid.overhead_bits(weight.in_features, scale_bits)


def plan_cost(plan: Mapping[str, GridSpec], weights: Iterable[WeightShape], scale_bits: int = 16) -> PlanCost:
    """Bits per weight (codes only and with overhead, all and active weights) and bytes of a plan.

    Weights that the plan lacks, as they are kept, count for nothing: averages are over what is quantized.
    """
    codes = overhead = numel = 0
    active_codes = active_overhead = active_numel = 0.0
    for weight in planned(plan, weights):
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


def plan_to_json(plan: Mapping[str, GridSpec], cost: PlanCost, kept: Sequence[str] = ()) -> dict[str, Any]:
    """JSON form of a plan and of what is kept; ``plan_from_json`` and ``kept_from_json`` read them back."""
    data = {
        "version": PLAN_VERSION,
        **asdict(cost),
        "weights": {name: _grid_to_json(grid) for name, grid in plan.items()},
    }
    return data | ({"kept": list(kept)} if kept else {})


def kept_from_json(path: Path) -> tuple[str, ...]:
    """Names of the weights that a plan, which ``plan_from_json`` reads, keeps as they are."""
    kept = json.loads(path.read_text(encoding="utf8")).get("kept", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ValueError(f"{path} is not an allocation that moeq can read: kept must be a list of names")
    return tuple(kept)


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


def _grid_to_json(grid: GridSpec) -> dict[str, Any]:
    """Its attributes; the kind where it is not uniform."""
    return {name: value for name, value in asdict(grid).items() if (name, value) != ("kind", "uniform")}


def _grid_from_json(name: str, grid: Mapping[str, Any]) -> GridSpec:
    """A grid; errors name the weight, as a plan may have been edited by hand."""
    try:
        return GridSpec(**grid)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
