"""Codes and scales as blocks of GGUF's types, bit for bit; one function from a type to bytes.

A block is some consecutive in-features of one row: a float16 scale d, for some types a float16 offset m, and codes q.

    Q2_0  64 of d (q - 1)      Q4_0  32 of d (q - 8)      Q5_0  32 of d (q - 16)      Q8_0  32 of d q, q signed
    Q4_1  32 of d q + m        Q5_1  32 of d q + m        Q1_0  128 of d (2 q - 1)

    IQ4_NL  32 of d level[q], 16 levels      MXFP4  32 of 2^(e - 128) level[q], an exponent e of 8 bits, e2m1 twofold

Types of two-level grids (Q2_K to Q6_K) are in ``gguf_kquants``, NVFP4 in ``gguf_nvfp4``.

moeq's symmetric grids have the levels -2^(b-1) .. 2^(b-1) - 1, as Q4_0, Q5_0 and Q8_0 have.  Q2_0 has -1 .. 2: with
d = -scale, q = 1 - level gives the same values.  d may be of either sign in all of them.
Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.formats.e2m1 import exponents, sign_magnitudes
from moeq.formats.gguf_kquants import k_blocks
from moeq.formats.gguf_nvfp4 import nvfp4_blocks
from moeq.quant.carrier import CarrierMode, choose_carrier, recentre, regroup
from moeq.quant.spec import QuantizedWeight, middle

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class FileType:
    """A type of tensors in a GGUF file: its number, and how many weights a block of how many bytes holds."""

    number: int
    block: int
    num_bytes: int

    def row_bytes(self, in_features: int) -> int:
        """Of one row; raises ValueError where it is no whole number of blocks."""
        if in_features % self.block:
            raise ValueError(f"rows of {in_features} are no whole number of blocks of {self.block}")
        return in_features // self.block * self.num_bytes


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(0, 1, 4), "F16": FileType(1, 1, 2), "BF16": FileType(30, 1, 2), "I32": FileType(26, 1, 4),
    "Q1_0": FileType(41, 128, 18), "Q2_0": FileType(42, 64, 18),
    "Q4_0": FileType(2, 32, 18), "Q4_1": FileType(3, 32, 20), "Q5_0": FileType(6, 32, 22), "Q5_1": FileType(7, 32, 24),
    "Q8_0": FileType(8, 32, 34), "Q2_K": FileType(10, 256, 84), "Q3_K": FileType(11, 256, 110),
    "Q4_K": FileType(12, 256, 144), "Q5_K": FileType(13, 256, 176), "Q6_K": FileType(14, 256, 210),
    "IQ4_NL": FileType(20, 32, 18), "MXFP4": FileType(39, 32, 17), "NVFP4": FileType(40, 64, 36),
}  # fmt: skip
_TABLE_TYPES = ("IQ4_NL", "MXFP4", "NVFP4")
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
# Of a float16: the largest relative rounding, and the largest absolute one of a number below its normal ones.
RELATIVE, ABSOLUTE = 2.0**-11, 2.0**-25
_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)  # of the bits of a byte


def quantized_type(grid: PackedFormat, in_features: int, mode: CarrierMode) -> str:
    """Type of the file that holds a weight on a grid; raises ValueError where there is none."""
    return choose_carrier("gguf", grid.spec, in_features, mode).name


def plain_type(dtype: torch.dtype) -> str:
    """Type that holds the values of a dtype: floats of 16 or 32 bits, and indices; raises ValueError for others."""
    dtype = torch.int32 if dtype == torch.int64 else dtype
    if dtype not in _PLAIN:
        raise ValueError(f"GGUF holds no {dtype}")
    return _PLAIN[dtype]


def to_bytes(kind: str, weight: QuantizedWeight | Tensor, mode: CarrierMode = "exact") -> Bytes:
    """A weight as a type of the file holds it, uint8 [O, bytes of a row].

    Args:
        kind: Of ``FILE_TYPES``.
        weight: Codes for a type with blocks, otherwise values, [O, I].
        mode: "exact" refuses scales that float16 does not hold, "native" rounds them.

    Raises:
        ValueError: The type does not hold the codes, or the scales.
    """
    if isinstance(weight, Tensor):
        return plain(kind, weight)
    if weight.super_scales is not None:
        blocks: Bytes = k_blocks(weight, kind.lower()).numpy()
        return blocks
    if (weight.table or "uniform") != (kind.lower() if kind in _TABLE_TYPES else "uniform"):
        raise ValueError(f"{kind} does not hold a weight on {weight.kind}; quantize it on grid {kind.lower()}")
    if kind == "NVFP4":
        made: Bytes = nvfp4_blocks(weight).numpy()
        return made
    return _BLOCKS[kind](regroup(weight, FILE_TYPES[kind].block), mode)


def plain(kind: str, values: Tensor) -> Bytes:
    """Values as F32, F16, BF16 or I32, uint8 with the bytes of the last dimension in its place."""
    dtype = next(dtype for dtype, name in _PLAIN.items() if name == kind)
    return _bytes_of(values.to(dtype))


def rounding_bound(weight: QuantizedWeight) -> Tensor:
    """The most by which a float16 scale and offset may change a value, [O, G]: 2^bits roundings of the scale."""
    return 2**weight.bits * (weight.scale_OG.float().abs() * RELATIVE + ABSOLUTE)


def _symmetric(bits: int, pack: Callable[[Tensor], Tensor]) -> Callable[[QuantizedWeight, CarrierMode], Bytes]:
    """Blocks of a scale and codes, which ``pack`` makes bytes of, [O, B, S] -> [O, B, bytes]."""

    def make(weight: QuantizedWeight, mode: CarrierMode) -> Bytes:
        centred = recentre(weight, bits)
        scale_OB = _half(centred, mode)
        return _join([scale_OB if bits > 2 else -scale_OB], pack(_blocks(centred.codes_OI, weight)))

    return make


def _with_offset(bits: int, pack: Callable[[Tensor], Tensor]) -> Callable[[QuantizedWeight, CarrierMode], Bytes]:
    """Blocks of a scale, the offset -zero_point * scale, and codes as they are."""

    def make(weight: QuantizedWeight, mode: CarrierMode) -> Bytes:
        if weight.zero_point_OG is None or weight.bits != bits:
            raise ValueError(f"{weight.bits} bits are no asymmetric grid of {bits}")
        offset_OB = (-weight.zero_point_OG.float() * weight.scale_OG.float()).half()
        return _join([_half(weight, mode), offset_OB], pack(_blocks(weight.codes_OI, weight)))

    return make


def _signs(weight: QuantizedWeight, mode: CarrierMode) -> Bytes:
    """Blocks of Q1_0: half of the scale, and signs, eight a byte from the lowest bit on."""
    if weight.bits != 1:
        raise ValueError(f"{weight.bits} bits are more than signs")
    octets_OBN = (_blocks(weight.codes_OI, weight).unflatten(2, (-1, 8)) * _PLACES).sum(3, dtype=torch.uint8)
    return _join([_half(recentre(weight, 2), mode)], octets_OBN)


def _by_table(weight: QuantizedWeight, mode: CarrierMode) -> Bytes:
    """Blocks of IQ4_NL: a scale, and places in its table as they are."""
    return _join([_half(weight, mode)], _halves(_blocks(weight.codes_OI, weight)))


def _microscaled(weight: QuantizedWeight, mode: CarrierMode) -> Bytes:
    """Blocks of MXFP4: the exponent of a scale, and signs with places among the magnitudes."""
    halves_OBS = _halves(_blocks(sign_magnitudes(weight), weight))
    joined: Bytes = torch.cat([exponents(weight).unsqueeze(2), halves_OBS], 2).flatten(1).numpy()
    return joined


def _half(weight: QuantizedWeight, mode: CarrierMode) -> Tensor:
    """Scales in float16; the scale of a group whose values are all zero does not matter."""
    scale_OB = weight.scale_OG.float()
    half_OB = scale_OB.half()
    if torch.equal(half_OB.float(), scale_OB):
        return half_OB
    zero = middle(weight.bits) if weight.zero_point_OG is None else weight.zero_point_OG.unsqueeze(2)
    used_OB = (_blocks(weight.codes_OI, weight) != zero).any(2)
    if not bool((half_OB.isfinite() | ~used_OB).all()):
        raise ValueError("a scale is above 65504, the largest of float16")
    wrong = int(((half_OB.float() != scale_OB) & used_OB).sum())
    if wrong and mode == "exact":
        smallest = float(scale_OB[used_OB].abs().min())
        raise ValueError(
            f"float16, in which GGUF stores scales, does not hold {wrong} of them exactly (smallest: {smallest:.3g}); "
            "set carrier to native, which rounds them and reports by how much"
        )
    return half_OB.masked_fill(~used_OB & ~half_OB.isfinite(), 0.0)


def _blocks(codes_OI: Tensor, weight: QuantizedWeight) -> Tensor:
    rows, groups = weight.scale_OG.shape
    return codes_OI.view(rows, groups, -1)


def _halves(codes_OBS: Tensor) -> Tensor:
    """Two codes of 4 bits a byte: the first half of the block in the low ones."""
    low, high = (codes_OBS & 15).chunk(2, 2)
    return low | high << 4


def _fifths(codes_OBS: Tensor) -> Tensor:
    """The fifth bits of 32 codes in four bytes, then four bits each."""
    bits = (codes_OBS >> 4).unflatten(2, (4, 8)) * _PLACES
    return torch.cat([bits.sum(3, dtype=torch.uint8), _halves(codes_OBS)], 2)


def _quarters(codes_OBS: Tensor) -> Tensor:
    """Four codes of 2 bits a byte in their order, for a negated scale: 1 - level = 3 - code."""
    first, second, third, fourth = (3 - codes_OBS).unflatten(2, (16, 4)).unbind(3)
    return first | second << 2 | third << 4 | fourth << 6


def _signed(codes_OBS: Tensor) -> Tensor:
    """Codes as signed bytes: minus 128 modulo 256."""
    return codes_OBS ^ 128


def _join(halves: list[Tensor], codes_OBN: Tensor) -> Bytes:
    parts = [half.contiguous().view(torch.uint8).unflatten(1, (-1, 2)) for half in halves]
    joined: Bytes = torch.cat([*parts, codes_OBN], 2).flatten(1).numpy()
    return joined


def _bytes_of(values: Tensor) -> Bytes:
    found: Bytes = values.contiguous().view(torch.uint8).numpy()
    return found


_BLOCKS: dict[str, Callable[[QuantizedWeight, CarrierMode], Bytes]] = {
    "Q1_0": _signs, "Q2_0": _symmetric(2, _quarters), "Q4_0": _symmetric(4, _halves), "Q5_0": _symmetric(5, _fifths),
    "Q8_0": _symmetric(8, _signed), "Q4_1": _with_offset(4, _halves), "Q5_1": _with_offset(5, _fifths),
    "IQ4_NL": _by_table, "MXFP4": _microscaled,
}  # fmt: skip
