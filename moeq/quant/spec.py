"""Frozen dataclasses that the numerical core takes and returns: grids, quantized weights, fallbacks and others.

A quantized weight is ``real = scale * (code - zero_point)`` with integer codes in ``[0, 2^bits)``, computed in float32.
Symmetric grids have a fixed zero point (``middle``), which is not stored; on full-range ones, which are stored alike, a
scale may be negative.  A grid of one bit has two levels of equal size and opposite sign.  Scales are held in the dtype
in which they are stored, rounded before any weight is quantized, so that what is evaluated is what is exported.
Two-level grids (``moeq.quant.kinds``) have integer scales and minima, and what these are multiples of beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moeq.quant.kinds import NAMED, SUPER_BLOCK, TABLES, TWO_LEVEL, Kind, StoredKind, TableKind, TwoLevelKind

MIN_BITS, MAX_BITS = 1, 8


def middle(bits: int) -> float:
    """Zero point of a symmetric grid, 2^(bits - 1); with two levels it lies between them."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


@dataclass(frozen=True)
class GridSpec:
    """The integer grid of one weight.

    Attributes:
        bits: Bits per code, 1 to 8.
        group_size: Consecutive in-features that share a scale; None is one group per output channel.
        symmetric: Fixed zero point in the middle of the grid, no zero point stored.
        clip_search: Shrink the range of each group to the one with the least error in the 2.4-norm; on a two-level
            grid, search scales and minima by weighted squares.
        kind: Uniform groups; full-range, which are symmetric uniform groups with scales of either sign; or a two-level
            or table grid, from whose name bits, groups and symmetry follow (``of_kind``).
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    clip_search: bool = True
    kind: Kind = "uniform"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"grid ({self.kind}) must be one of {', '.join(get_args(Kind))}; choose uniform")
        named, own = NAMED.get(self.kind), (self.bits, self.group_size, self.symmetric)
        if named is not None and own != (named.bits, named.group_size, named.symmetric):
            raise ValueError(
                f"a grid of kind {self.kind} has {named.bits} bits in groups of {named.group_size}, not "
                f"{self.bits} in groups of {self.group_size}; choose another kind, or uniform"
            )
        if self.kind == "full_range" and not self.symmetric:
            raise ValueError("a grid of kind full_range has no zero points; set symmetric, or choose uniform")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits ({self.bits}) must be between {MIN_BITS} and {MAX_BITS}; choose 3 or 4")
        if self.bits == 1 and not (self.symmetric and self.kind == "uniform"):
            raise ValueError(
                "bits (1) leave two levels, plus and minus the scale's half; set symmetric: true and grid: uniform"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size ({self.group_size}) must be positive, or null for one group per channel")

    @classmethod
    def of_kind(cls, kind: Kind, *, clip_search: bool = True) -> "GridSpec":
        """The two-level or table grid of a name; raises ValueError for "uniform", which says too little."""
        if kind not in NAMED:
            raise ValueError(f"grid ({kind}) must be one of {', '.join(NAMED)}; give bits for a uniform grid")
        known = NAMED[kind]
        return cls(known.bits, known.group_size, known.symmetric, clip_search, kind)

    def with_bits(self, bits: int) -> "GridSpec":
        """The uniform grid of another width; one bit has no zero points, and no scales of either sign."""
        return replace(self, bits=1, symmetric=True, kind="uniform") if bits == 1 else replace(self, bits=bits)

    @property
    def two_level(self) -> TwoLevelKind | None:
        """What the kind says of two levels of scales; None where there is one."""
        return TWO_LEVEL.get(self.kind)

    @property
    def table(self) -> TableKind | None:
        """The table of levels; None where they are evenly spaced."""
        return TABLES.get(self.kind)

    @property
    def is_named(self) -> bool:
        """Whether bits, groups and symmetry follow from the kind."""
        return self.kind in NAMED

    @property
    def stored_kind(self) -> StoredKind:
        """Kind of what is stored: a full-range grid is a uniform one there, whose scales happen to have signs."""
        return "uniform" if self.kind == "full_range" else self.kind

    @property
    def unit(self) -> int | None:
        """Consecutive in-features that stay together: a group, or a super-block; None is the whole row."""
        return self.group_size if self.two_level is None else SUPER_BLOCK

    @property
    def label(self) -> str:
        """For people."""
        if self.two_level is not None:
            return f"{self.kind.upper()} ({self.bits} bits, two-level groups of {self.group_size})"
        if self.table is not None:
            return f"{self.kind.upper()} ({self.bits} bits by a table of levels, groups of {self.group_size})"
        symmetry = ", full-range symmetric" if self.kind == "full_range" else ", symmetric" if self.symmetric else ""
        groups = "a group per channel" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bit{'s' if self.bits > 1 else ''}, {groups}{symmetry}"

    def num_groups(self, in_features: int) -> int:
        """Groups of a row of ``in_features`` weights; raises ValueError where the group size does not divide it."""
        if self.group_size is None:
            return 1
        if self.two_level is not None and in_features % SUPER_BLOCK:
            raise ValueError(
                f"grid ({self.kind}) needs in_features in multiples of {SUPER_BLOCK}, not {in_features}; give such "
                "weights bits and a group_size of their own"
            )
        if in_features % self.group_size:
            divisors = [d for d in (16, 32, 64, 128) if in_features % d == 0]
            remedy = f"choose one of {divisors} or null" if divisors else "choose null (one group per channel)"
            raise ValueError(f"group_size ({self.group_size}) must divide in_features ({in_features}); {remedy}")
        return in_features // self.group_size

    def overhead_bits(self, in_features: int, scale_bits: int = 16) -> int:
        """Bits of the scales and zero points of a row; ``scale_bits`` of a scale unless it is one of two levels."""
        groups = self.num_groups(in_features)
        if self.two_level is not None:
            return in_features // SUPER_BLOCK * self.two_level.overhead_bits
        return groups * (scale_bits + (0 if self.symmetric else self.bits))


def choose_grid(kind: Kind, bits: int, group_size: int | None, *, symmetric: bool, clip_search: bool) -> GridSpec:
    """The grid of a run's options.

    Raises:
        ValueError: Bits, group size or symmetry are neither the default nor those that the kind that is asked for has,
            which would not be heard.
    """
    if kind == "full_range":
        return GridSpec(bits, group_size, symmetric=True, clip_search=clip_search, kind=kind)
    if kind == "uniform":
        return GridSpec(bits, group_size, symmetric, clip_search)
    grid, usual = GridSpec.of_kind(kind, clip_search=clip_search), GridSpec()
    for name, given in (("bits", bits), ("group_size", group_size), ("symmetric", symmetric)):
        if given not in (getattr(usual, name), getattr(grid, name)):
            raise ValueError(
                f"{name} ({given}) follows from grid ({kind}), {grid.label}; leave it out, or grid: uniform"
            )
    return grid


@dataclass(frozen=True)
class SolveSpec:
    """Settings of the GPTQ solve.

    Attributes:
        damping: Fraction of the mean Hessian diagonal that is added to the diagonal; 0.01 in the papers.  0.1 holds
            better where the calibration data are few or of other domains, and costs nothing elsewhere
            (benchmarks/results/few_tokens.md).
        act_order: Quantize columns by decreasing Hessian diagonal, with the groups of the original column order.
        column_block: Columns per lazy update of the columns to their right.
    """

    damping: float = 0.1
    act_order: bool = True
    column_block: int = 128

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"damping ({self.damping}) must lie between 0 and 1 (exclusive); the usual value is 0.01")
        if self.column_block < 1:
            raise ValueError(f"column_block ({self.column_block}) must be positive; the usual value is 128")


@dataclass(frozen=True)
class SuperScales:
    """What the integer scales and minima of a two-level grid are multiples of, for weights [.., O, I].

    Attributes:
        kind: Name of the grid.
        scale_OB: float16, d of each of the B = I / 256 super-blocks of a row.
        min_OB: float16, dmin; None for a symmetric grid.
        dtype: Of the weights that the codes stand for, to which the float32 values are rounded.
    """

    kind: StoredKind
    scale_OB: Tensor
    min_OB: Tensor | None
    dtype: torch.dtype

    def each(self, change: Callable[[Tensor], Tensor]) -> "SuperScales":
        """The same with each of its tensors changed."""
        return replace(
            self, scale_OB=change(self.scale_OB), min_OB=None if self.min_OB is None else change(self.min_OB)
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight of shape [O, I].

    Attributes:
        codes_OI: uint8, each in [0, 2^bits).
        scale_OG: Storage dtype, positive, but on a full-range grid; G = 1 or I / group_size.  On a two-level grid int8,
            the integer scales.
        zero_point_OG: uint8 in [0, 2^bits), or None for a symmetric grid (``middle``).  On a two-level
            grid int8, the integer minima.
        bits: Bits per code.
        group_size: In-features per scale, or None for one group per row.
        super_scales: Of a two-level grid; None where a group has one scale.
        table: Name of the table of levels that codes are places in; None where they are evenly spaced.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    bits: int
    group_size: int | None
    super_scales: SuperScales | None = None
    table: StoredKind | None = None

    @property
    def kind(self) -> StoredKind:
        """Of its grid, as it is stored."""
        if self.super_scales is not None:
            return self.super_scales.kind
        return self.table or "uniform"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that the codes stand for."""
        return self.scale_OG.dtype if self.super_scales is None else self.super_scales.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored of it, by name."""
        found: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.super_scales is not None:
            found |= {f"super {name}": v for name, v in vars(self.super_scales).items() if isinstance(v, Tensor)}
        return found

    def each(self, change: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """The same with each of its tensors changed."""
        return replace(
            self,
            codes_OI=change(self.codes_OI),
            scale_OG=change(self.scale_OG),
            zero_point_OG=None if self.zero_point_OG is None else change(self.zero_point_OG),
            super_scales=None if self.super_scales is None else self.super_scales.each(change),
        )

    def rows(self, part: slice) -> "QuantizedWeight":
        """Some of its rows."""
        return self.each(lambda tensor: tensor[part])


@dataclass(frozen=True)
class Fallback:
    """Something that was not done as asked, for the report: which weight, why, and what was done instead."""

    weight: str
    reason: str
    detail: str


Routing = Literal["routed", "all_experts"]
WeightKind = Literal["attention", "dense", "shared", "routed"]


@dataclass(frozen=True)
class WeightShape:
    """A weight as the allocator sees it.

    Attributes:
        name: Canonical name.
        kind: "attention", "dense", "shared" or "routed".
        out_features: O.
        in_features: I.
        block: Index of the decoder block.
        linear: Last part of the name: "q_proj", "gate_proj", ...
        expert: Number of the routed expert; None for every other weight.
        active_share: Share of tokens for which the weight is used: top-k / E for routed experts, else 1.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    block: int
    linear: str
    expert: int | None = None
    active_share: float = 1.0

    @property
    def numel(self) -> int:
        """O * I."""
        return self.out_features * self.in_features
