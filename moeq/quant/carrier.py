"""Which storage type of a runtime's format holds a grid: exactly where one does, and at what size.

A grid of b bits with integer zero points has levels (code - zero) * scale with code - zero between -(2^b - 1) and
2^b - 1: all of them are levels of a symmetric grid of b + 1 bits.  Those of one bit, scale / 2 and -scale / 2, are
the levels 1 and -1 of one of two bits with half the scale.  So 2 and 3 bits fit any symmetric type of 4 bits,
and asymmetric 4 bits one of 5, with the same values.  A *carrier* is such a type.  "exact" asks for one that holds
every value; "native" takes the type of the grid's own width where the format has one whose offset is real-valued, at
the price of its rounding.

Sources: ggml-common.h of llama.cpp (block layouts), compressed-tensors 0.20 (integers, NVFP4, MXFP4), mlx 0.32
(affine), GPTQModel 7.7.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moeq.quant.kinds import TABLES, TWO_LEVEL, StoredKind
from moeq.quant.packing import num_words
from moeq.quant.spec import GridSpec, QuantizedWeight

FormatName = Literal["compressed-tensors", "gguf", "mlx", "gptq"]
CarrierMode = Literal["exact", "native"]
# Linears of one module that vLLM and SGLang merge into one, by what it is called here: q, k and v; the two first
# projections of latent attention; gate and up; what linear attention reads with.
MERGED_LINEARS = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv",
    "q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a",
    "gate_proj": "gate_up", "up_proj": "gate_up", "w1": "gate_up", "w3": "gate_up",
    "in_proj_qkv": "in_proj", "in_proj_z": "in_proj",
}  # fmt: skip
FORMATS: tuple[FormatName, ...] = ("compressed-tensors", "gguf", "mlx", "gptq")


@dataclass(frozen=True)
class Carrier:
    """A storage type of a format, for one weight.

    Attributes:
        name: As the format calls it.
        bits: Per code.
        group_size: In-features that share a scale in the file; None is the whole row.
        zero_point: "middle": symmetric, nothing is stored; "integer": one of ``bits`` bits per group; "real": an offset
            of 16 bits per group, which is rounded.
        kind: Of a two-level or table grid, which the type is; scales and offsets are as ``moeq.quant.kinds`` has them.
    """

    name: str
    bits: int
    group_size: int | None
    zero_point: Literal["middle", "integer", "real"]
    kind: StoredKind = "uniform"

    def num_bits(self, out_features: int, in_features: int) -> int:
        """Of a weight in the file: codes, scales of 16 bits, zero points; rows of codes fill whole words of 32 bits.

        Integer zero points are packed along the out-features.
        """
        if self.kind != "uniform":
            table = TABLES.get(self.kind)  # two-level grids have scales of their own
            overhead = GridSpec.of_kind(self.kind).overhead_bits(in_features, 0 if table is None else table.scale_bits)
            return out_features * (in_features * self.bits + overhead) + (0 if table is None else table.global_bits)
        groups = 1 if self.group_size is None else in_features // self.group_size
        zeros = {"middle": 0, "integer": 32 * num_words(out_features, self.bits), "real": 16 * out_features}
        codes = 32 * num_words(in_features, self.bits) * out_features
        return codes + groups * (16 * out_features + zeros[self.zero_point])


def choose_carrier(format_name: FormatName, grid: GridSpec, in_features: int, mode: CarrierMode = "exact") -> Carrier:
    """The smallest type of a format that holds a grid.

    Args:
        format_name: Of ``FORMATS``.
        grid: Of the weight.
        in_features: Of the weight.
        mode: "exact" or "native", see above.

    Raises:
        ValueError: No type does; it says which grids the format holds.
    """
    if grid.is_named:
        return _own_type(format_name, grid, in_features)
    found = _CHOOSERS[format_name](grid, in_features, mode)
    if found is None:
        raise ValueError(f"{format_name} has no type that holds {grid.label} ({mode}): {_HELD[format_name]}")
    return found


def _own_type(format_name: FormatName, grid: GridSpec, in_features: int) -> Carrier:
    """The type that is a two-level or table grid; it holds every value, whatever the mode."""
    if grid.kind not in _NAMED[format_name]:
        others = " and ".join(name for name in FORMATS if grid.kind in _NAMED[name])
        raise ValueError(f"{format_name} has no type that holds {grid.label}, a grid of {others}")
    grid.num_groups(in_features)  # raises where rows are no whole blocks
    if format_name == "gguf" and grid.kind == "nvfp4" and in_features % _NVFP4_BLOCK:
        raise ValueError(f"gguf has NVFP4 in rows of whole {_NVFP4_BLOCK}, not {in_features}")
    offset: Literal["middle", "real"] = "middle" if grid.symmetric else "real"
    return Carrier(grid.kind.upper(), grid.bits, grid.group_size, offset, grid.stored_kind)


def symmetric_bits(grid: GridSpec) -> int:
    """Width of the symmetric grid that has every level of a grid."""
    return grid.bits if grid.symmetric and grid.bits > 1 else grid.bits + 1


def recentre(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """The same values on a symmetric grid of ``bits`` bits: codes' = code - zero_point + 2^(bits - 1).

    Of one bit codes are doubled and scales halved.

    Raises:
        ValueError: The values do not fit; at least ``symmetric_bits`` of the grid are needed.
    """
    if weight.kind != "uniform":
        raise ValueError(f"{weight.kind} is no grid of uniform groups, and has no symmetric one of {bits} bits")
    if weight.bits == 1:
        signs_OI, half_OG = 2 * weight.codes_OI, (weight.scale_OG.float() / 2).to(weight.scale_OG.dtype)
        weight = replace(weight, codes_OI=signs_OI + 1, scale_OG=half_OG, bits=2)
    own = 2 ** (weight.bits - 1) if weight.zero_point_OG is None else _spread(weight.zero_point_OG.short(), weight)
    codes_OI = weight.codes_OI.short() - own + 2 ** (bits - 1)
    if codes_OI.numel() and not (int(codes_OI.min()) >= 0 and int(codes_OI.max()) < 2**bits):
        raise ValueError(f"{weight.bits} bits with these zero points do not fit {bits} symmetric ones; take one more")
    return replace(weight, codes_OI=codes_OI.to(torch.uint8), zero_point_OG=None, bits=bits)


def regroup(weight: QuantizedWeight, group_size: int | None) -> QuantizedWeight:
    """The same values with smaller groups: scales and zero points are repeated.

    Raises:
        ValueError: The groups do not divide those of the weight.
    """
    if group_size == weight.group_size:
        return weight
    in_features = weight.codes_OI.shape[1]
    size = weight.group_size or in_features
    if group_size is None or size % group_size:
        raise ValueError(f"groups of {size} cannot become groups of {group_size or in_features}; choose a divisor")
    zero_OG = weight.zero_point_OG
    return replace(
        weight,
        scale_OG=weight.scale_OG.repeat_interleave(size // group_size, 1),
        zero_point_OG=None if zero_OG is None else zero_OG.repeat_interleave(size // group_size, 1),
        group_size=group_size,
    )


def _spread(values_OG: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Values of groups for each in-feature, [O, I]."""
    return values_OG.repeat_interleave(weight.codes_OI.shape[1] // values_OG.shape[1], 1)


def _block(grid: GridSpec, in_features: int, sizes: tuple[int, ...]) -> int | None:
    """The largest of some group sizes that divides the groups of a grid, and the row."""
    own = grid.group_size or in_features
    return next((size for size in sorted(sizes, reverse=True) if own % size == 0 and in_features % size == 0), None)


def _gguf(grid: GridSpec, in_features: int, mode: CarrierMode) -> Carrier | None:
    width = symmetric_bits(grid)
    if grid.bits == 1 and _block(grid, in_features, (128,)):
        return Carrier("Q1_0", 1, 128, "middle")
    if width == 2 and _block(grid, in_features, (64,)):
        return Carrier("Q2_0", 2, 64, "middle")
    if _block(grid, in_features, (32,)) is None:
        return None
    if mode == "native" and not grid.symmetric and grid.bits in (4, 5):
        return Carrier(f"Q{grid.bits}_1", grid.bits, 32, "real")
    bits = next((bits for bits in (4, 5, 8) if width <= bits), None)
    return None if bits is None else Carrier(f"Q{bits}_0", bits, 32, "middle")


def _compressed_tensors(grid: GridSpec, in_features: int, mode: CarrierMode) -> Carrier | None:
    if grid.group_size not in (None, 32, 64, 128):
        return None
    if mode == "native":
        width = symmetric_bits(grid) if grid.symmetric else grid.bits
        return Carrier(f"int{width}", width, grid.group_size, "middle" if grid.symmetric else "integer")
    bits = next((bits for bits in (4, 8) if symmetric_bits(grid) <= bits), None)
    return None if bits is None else Carrier(f"int{bits}", bits, grid.group_size, "middle")


def _mlx(grid: GridSpec, in_features: int, mode: CarrierMode) -> Carrier | None:
    size = _block(grid, in_features, (32, 64, 128))
    width = max(2, grid.bits) if mode == "native" else symmetric_bits(grid)
    bits = next((bits for bits in (2, 3, 4, 5, 6, 8) if width <= bits), None)
    return None if size is None or bits is None else Carrier(f"affine{bits}", bits, size, "real")


def _gptq(grid: GridSpec, in_features: int, mode: CarrierMode) -> Carrier | None:
    bits = next(bits for bits in (2, 3, 4, 8) if grid.bits <= bits)
    if grid.group_size not in (None, 16, 32, 64, 128, 256, 512, 1024):
        return None
    return Carrier(f"int{bits}", bits, grid.group_size, "integer")


_CHOOSERS: dict[FormatName, Callable[[GridSpec, int, CarrierMode], Carrier | None]] = {
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
    "mlx": _mlx,
    "gptq": _gptq,
}
_NVFP4_BLOCK = 64  # of GGUF
_NAMED: dict[FormatName, frozenset[str]] = {
    "compressed-tensors": frozenset({"mxfp4", "nvfp4"}),
    "gguf": frozenset({*TWO_LEVEL, *TABLES}),
    "mlx": frozenset(),
    "gptq": frozenset(),
}
_HELD: dict[FormatName, str] = {
    "compressed-tensors": "groups of 32, 64, 128 or per channel; exactly up to 8 bits symmetric, 7 asymmetric",
    "gguf": "groups that are multiples of 32, or per channel with rows that are; exactly up to 8 bits symmetric, "
    "7 asymmetric",
    "mlx": "groups that are multiples of 32, or per channel with rows that are; exactly up to 8 bits symmetric, "
    "7 asymmetric",
    "gptq": "groups of 16, 32, 64, 128, 256, 512, 1024 or per channel",
}
