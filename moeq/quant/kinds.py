"""Kinds of grids: uniform groups, the same with scales of either sign, and the two-level grids of llama.cpp (K-quants).

A *full-range* grid is a symmetric one whose scales have a sign: the lowest level, which has no counterpart above, lies
where the largest weight of a group does.  What is stored is what a symmetric uniform grid stores.

A two-level grid has *super-blocks* of 256 weights with a float16 scale d, and a float16 minimum dmin where the grid is
not symmetric, and in them groups of 16 or 32 weights with an integer scale s and an integer minimum m:

    real = (d s) code - (dmin m),        symmetric:  real = (d s) (code - 2^(bits - 1))

Both products are exact in float32, and so is the first one times a code: the value is rounded once, whatever the order
in which a runtime computes it.  Source: the block layouts in ggml-common.h of llama.cpp.

A *table* grid has groups of 16 or 32 weights with one scale, and codes that are places in a table of levels:

    real = scale * level[code]

IQ4_NL of llama.cpp has levels that are denser around 0, and float16 scales.  MXFP4 (OCP Microscaling, version 1.0) and
NVFP4 (NVIDIA) have the values of a float of 4 bits (e2m1).  Scales of MXFP4 are powers of two; those of NVFP4 floats of
8 bits (e4m3) times a global scale of the weight, for which moeq takes a power of two: both together are exact in
bfloat16, and no order of products rounds.
"""

from dataclasses import dataclass
from typing import Literal

StoredKind = Literal["uniform", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4", "nvfp4"]
Kind = Literal["uniform", "full_range", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "mxfp4", "nvfp4"]
ScaleForm = Literal["float16", "power of two", "e4m3"]
SUPER_BLOCK = 256


@dataclass(frozen=True)
class TwoLevelKind:
    """A two-level grid.

    Attributes:
        bits: Bits per code.
        group_size: Weights that share s and m.
        symmetric: No minima; s has a sign.
        scale_bits: Bits of s, and of m.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_bits: int

    @property
    def num_groups(self) -> int:
        """Groups of a super-block."""
        return SUPER_BLOCK // self.group_size

    @property
    def lowest_scale(self) -> int:
        """Of s."""
        return -(2 ** (self.scale_bits - 1)) if self.symmetric else 0

    @property
    def highest_scale(self) -> int:
        """Of s, and of m."""
        return self.lowest_scale + 2**self.scale_bits - 1

    @property
    def overhead_bits(self) -> int:
        """Bits of a super-block that are not codes."""
        return (1 if self.symmetric else 2) * (16 + self.num_groups * self.scale_bits)


TWO_LEVEL: dict[str, TwoLevelKind] = {
    "q2_k": TwoLevelKind(2, 16, symmetric=False, scale_bits=4),
    "q3_k": TwoLevelKind(3, 16, symmetric=True, scale_bits=6),
    "q4_k": TwoLevelKind(4, 32, symmetric=False, scale_bits=6),
    "q5_k": TwoLevelKind(5, 32, symmetric=False, scale_bits=6),
    "q6_k": TwoLevelKind(6, 16, symmetric=True, scale_bits=8),
}


@dataclass(frozen=True)
class TableKind:
    """A grid whose levels stand in a table.

    Attributes:
        levels: In increasing order; a code is the place in it.
        scale_bits: Bits of a scale in the files of its runtime.
        scale_form: What a scale can be; "e4m3" is with a power of two for the whole weight.
        global_bits: Bits that the whole weight takes beside codes and scales there.
    """

    levels: tuple[float, ...]
    scale_bits: int
    scale_form: ScaleForm = "float16"
    global_bits: int = 0
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True  # no zero points


# The two levels of one bit, in scales: a sweep looks the nearer one up, as there is no whole number between them.
SIGNS = TableKind((-0.5, 0.5), scale_bits=16, bits=1)
_E2M1 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
TABLES: dict[str, TableKind] = {
    "iq4_nl": TableKind((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), scale_bits=16),
    "mxfp4": TableKind(_E2M1, scale_bits=8, scale_form="power of two"),
    "nvfp4": TableKind(_E2M1, scale_bits=8, scale_form="e4m3", global_bits=32, group_size=16),
}
# Kinds whose name says bits, groups and symmetry.
NAMED: dict[str, TwoLevelKind | TableKind] = {**TWO_LEVEL, **TABLES}
