"""Blocks of llama.cpp's K-types from codes on the two-level grid of the same name: bytes, exactly.

A block holds a super-block of 256 weights; N blocks of a weight follow each other row by row.  Layouts: ggml-common.h
of llama.cpp (``block_q2_K`` to ``block_q6_K``), little-endian float16.

    Q2_K   84 bytes   scales 16 (low half s, high half m), codes 64, d, dmin
    Q3_K  110         third bits 32, codes 64, scales 12, d
    Q4_K  144         d, dmin, scales and minima 12, codes 128
    Q5_K  176         d, dmin, scales and minima 12, fifth bits 32, codes 128
    Q6_K  210         low four bits 128, high two 64, scales 16 (int8), d
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moeq.quant.kinds import SUPER_BLOCK, TWO_LEVEL
from moeq.quant.spec import QuantizedWeight

BLOCK_BYTES = {name: (SUPER_BLOCK * kind.bits + kind.overhead_bits) // 8 for name, kind in TWO_LEVEL.items()}


def k_blocks(weight: QuantizedWeight, kind: str) -> Tensor:
    """Bytes of a weight, uint8 [O, I / 256 * bytes of a block]; a CPU tensor.

    Args:
        weight: On the two-level grid of the kind.
        kind: Of ``BLOCK_BYTES``.

    Raises:
        ValueError: It is on another grid.
    """
    if weight.super_scales is None or weight.kind != kind:
        raise ValueError(f"{kind.upper()} does not hold a weight on {weight.kind}; quantize it on grid {kind}")
    rows = weight.codes_OI.shape[0]
    code_NS = weight.codes_OI.cpu().reshape(-1, SUPER_BLOCK)
    scale_NG = weight.scale_OG.cpu().reshape(len(code_NS), -1).short()
    min_NG = None if weight.zero_point_OG is None else weight.zero_point_OG.cpu().reshape(scale_NG.shape).short()
    parts = _LAYOUTS[weight.kind](code_NS, scale_NG, torch.zeros_like(scale_NG) if min_NG is None else min_NG)
    supers = [_half_bytes(weight.super_scales.scale_OB)]
    if weight.super_scales.min_OB is not None:
        supers.append(_half_bytes(weight.super_scales.min_OB))
    ordered = [*supers, *parts] if weight.kind in ("q4_k", "q5_k") else [*parts, *supers]
    return torch.cat(ordered, 1).reshape(rows, -1)


def _half_bytes(super_OB: Tensor) -> Tensor:
    """float16 as bytes, [N, 2]."""
    return super_OB.cpu().reshape(-1, 1).contiguous().view(torch.uint8)


def _q2_k(code_NS: Tensor, scale_NG: Tensor, min_NG: Tensor) -> list[Tensor]:
    return [(scale_NG | min_NG << 4).to(torch.uint8), _two_bits(code_NS)]


def _q3_k(code_NS: Tensor, scale_NG: Tensor, _: Tensor) -> list[Tensor]:
    high_N8L = (code_NS >> 2).view(-1, 8, 32)
    scale_NG = scale_NG + 32
    low_N8 = scale_NG[:, :8] & 15 | (scale_NG[:, 8:] & 15) << 4
    top_N44 = (scale_NG >> 4).view(-1, 4, 4)  # of scales 4 k + j: in byte j, from bit 2 k on
    return [_merged(high_N8L, 1), _two_bits(code_NS & 3), low_N8.to(torch.uint8), _merged(top_N44.to(torch.uint8), 2)]


def _q4_k(code_NS: Tensor, scale_NG: Tensor, min_NG: Tensor) -> list[Tensor]:
    return [_six_bits(scale_NG, min_NG), _nibbles(code_NS)]


def _q5_k(code_NS: Tensor, scale_NG: Tensor, min_NG: Tensor) -> list[Tensor]:
    return [_six_bits(scale_NG, min_NG), _merged((code_NS >> 4).view(-1, 8, 32), 1), _nibbles(code_NS & 15)]


def _q6_k(code_NS: Tensor, scale_NG: Tensor, _: Tensor) -> list[Tensor]:
    low_N2HL = (code_NS & 15).view(-1, 2, 2, 64)
    low_NB = (low_N2HL[:, :, 0] | low_N2HL[:, :, 1] << 4).flatten(1)
    return [low_NB, _two_bits(code_NS >> 4), scale_NG.to(torch.int8).view(torch.uint8)]


def _two_bits(code_NS: Tensor) -> Tensor:
    """64 bytes: of each half of a block, byte l holds codes l, l + 32, l + 64, l + 96."""
    return _merged(code_NS.reshape(-1, 4, 32), 2).view(-1, 64)


def _nibbles(code_NS: Tensor) -> Tensor:
    """128 bytes: of each quarter of a block, byte l holds codes l and l + 32."""
    return _merged(code_NS.reshape(-1, 2, 32), 4).view(-1, 128)


def _merged(code_NKL: Tensor, bits: int) -> Tensor:
    """Bytes [N, L] of K codes each, the first one lowest."""
    byte_NL = torch.zeros_like(code_NKL[:, 0])
    for position in range(code_NKL.shape[1]):
        byte_NL |= code_NKL[:, position] << (bits * position)
    return byte_NL


def _six_bits(scale_NG: Tensor, min_NG: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in 12 bytes: four whole ones each, then halves of the other four."""
    first_s, last_s, first_m, last_m = scale_NG[:, :4], scale_NG[:, 4:], min_NG[:, :4], min_NG[:, 4:]
    parts = [first_s | last_s >> 4 << 6, first_m | last_m >> 4 << 6, last_s & 15 | (last_m & 15) << 4]
    return torch.cat(parts, 1).to(torch.uint8)


_LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
