"""Frozen dataclasses that the numerical core takes and returns: grids, quantized weights, fallbacks and others.

A quantized weight is ``real = scale * (code - zero_point)`` with integer codes in ``[0, 2^bits)``, computed in float32.
Symmetric grids have the fixed zero point ``2^(bits - 1)``, which is not stored.  Scales are held in the dtype in which
they are stored, rounded before any weight is quantized, so that what is evaluated is what is exported.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class GridSpec:
    """The integer grid of one weight.

    Attributes:
        bits: Bits per code, 2 to 8.
        group_size: Consecutive in-features that share a scale; None is one group per output channel.
        symmetric: Fixed zero point in the middle of the grid, no zero point stored.
        clip_search: Shrink the range of each group to the one with the least error in the 2.4-norm.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    clip_search: bool = True

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits ({self.bits}) must be between {MIN_BITS} and {MAX_BITS}; choose 3 or 4")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size ({self.group_size}) must be positive, or null for one group per channel")

    @property
    def label(self) -> str:
        """For people."""
        groups = "a group per channel" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits, {groups}{', symmetric' if self.symmetric else ''}"

    def num_groups(self, in_features: int) -> int:
        """Groups of a row of ``in_features`` weights; raises ValueError where the group size does not divide it."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            divisors = [d for d in (16, 32, 64, 128) if in_features % d == 0]
            remedy = f"choose one of {divisors} or null" if divisors else "choose null (one group per channel)"
            raise ValueError(f"group_size ({self.group_size}) must divide in_features ({in_features}); {remedy}")
        return in_features // self.group_size


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
class QuantizedWeight:
    """Codes, scales and zero points of one weight of shape [O, I].

    Attributes:
        codes_OI: uint8, each in [0, 2^bits).
        scale_OG: Storage dtype, positive; G = 1 or I / group_size.
        zero_point_OG: uint8 in [0, 2^bits), or None for a symmetric grid (zero point 2^(bits - 1)).
        bits: Bits per code.
        group_size: In-features per scale, or None for one group per row.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_point_OG: Tensor | None
    bits: int
    group_size: int | None


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
