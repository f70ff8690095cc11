"""Sources whose weights are integers of few bits: compressed-tensors, GPTQ and AWQ.

compressed-tensors: ``weight_packed`` (codes as moeq packs them, along the row) or ``weight`` (int8 or float8, one by
one), ``weight_scale``, where there are any ``weight_zero_point`` and ``weight_g_idx``.  GPTQ: ``qweight`` packed along
the in-features and ``qzeros`` along the out-features, ``scales``, ``g_idx``.  AWQ: both along the out-features, in an
order of its own.

Legend: O out, I in, G groups, W words.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.affine import Dequantized, Readable, dequantize, grid_of, parts_of
from moeq.checkpoint.float_formats import FLOAT8, scaled
from moeq.quant.packing import num_words, unpack
from moeq.quant.spec import MAX_BITS, MIN_BITS

WORD_BITS = 32
# Which of eight out-features each four bits of a word of AWQ hold, from the low end.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def weight_schemes(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How compressed-tensors describes the weights of each group of layers."""
    groups = description.get("config_groups") or {}
    return [group["weights"] for group in groups.values() if group.get("weights")]


def read_compressed_tensors(
    stored: Mapping[str, Readable], description: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Dequantized]]:
    """Weights of compressed-tensors by key, dequantized; see ``moeq.checkpoint.dequantized``.

    Raises:
        ValueError: A weight has no scales, or is of a layout that its description does not cover.
    """
    schemes = weight_schemes(description)
    widths = sorted({int(scheme["num_bits"]) for scheme in schemes})
    blocks = [scheme["block_structure"] for scheme in schemes if scheme.get("block_structure")]
    block = (int(blocks[0][0]), int(blocks[0][1])) if blocks else None
    for key, tensor in stored.items():
        owner, _, leaf = key.rpartition(".")
        if leaf == "weight_packed":
            yield f"{owner}.weight", _packed_rows(owner, stored, widths, dtype)
        elif leaf == "weight" and tensor.dtype in (torch.int8, *FLOAT8):
            zero = stored.get(f"{owner}.weight_zero_point")
            yield key, scaled(key, tensor, _part(stored, owner, "weight_scale"), block, dtype, zero)


def _packed_rows(owner: str, stored: Mapping[str, Readable], widths: list[int], dtype: torch.dtype) -> Dequantized:
    packed, scale, shape = (_part(stored, owner, leaf) for leaf in ("weight_packed", "weight_scale", "weight_shape"))
    zero, group = stored.get(f"{owner}.weight_zero_point"), stored.get(f"{owner}.weight_g_idx")
    num_out, num_in = (int(size) for size in shape.read().tolist())
    fitting = [bits for bits in widths if num_words(num_in, bits) == packed.shape[-1]]
    if len(fitting) != 1:
        raise ValueError(
            f"{owner} has {packed.shape[-1]} words a row for {num_in} in-features, which is not dense packing to one "
            f"of {widths} bits; dequantize the source first"
        )
    bits, half = fitting[0], 1 << (fitting[0] - 1)
    scale_shape = (scale.shape[0], scale.shape[-1] if len(scale.shape) > 1 else 1)
    row_O, even_I = grid_of(owner, (num_out, num_in), scale_shape, None)

    def make() -> Tensor:
        codes_OI, scale_OG = unpack(packed.read(), bits, num_in), scale.read().reshape(scale_shape)
        zero_OG = torch.full(scale_shape, half)  # codes are signed numbers plus this, and so are zero points
        if zero is not None:
            stored_zero = zero.read()
            if stored_zero.dtype == torch.int32 and zero.shape[0] == num_words(num_out, bits):
                zero_OG = unpack(stored_zero.mT, bits, num_out).mT
            else:
                zero_OG = stored_zero.int() + half
        group_I = even_I if group is None else group.read().long()
        return dequantize(codes_OI, scale_OG, zero_OG, row_O, group_I, dtype)

    parts = parts_of(packed, scale, shape, zero, group)
    return Dequantized(f"{owner}.weight", dtype, (num_out, num_in), parts, make)


def read_gptq(
    stored: Mapping[str, Readable], description: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Dequantized]]:
    """Weights of GPTQ by key, dequantized; see ``moeq.checkpoint.dequantized``.

    Raises:
        ValueError: Parts of a weight are missing or do not fit each other.
    """
    # The first format stores zero points less one; a zero point of 0 wraps.
    less = 0 if description.get("checkpoint_format") == "gptq_v2" else 1
    for key in stored:
        if key.endswith(".qweight"):
            owner = key.removesuffix(".qweight")
            yield f"{owner}.weight", _gptq(owner, stored, int(description["bits"]), less, dtype)


def _gptq(owner: str, stored: Mapping[str, Readable], bits: int, less: int, dtype: torch.dtype) -> Dequantized:
    packed, zero, scale = (_part(stored, owner, leaf) for leaf in ("qweight", "qzeros", "scales"))
    group, (num_groups, num_out) = stored.get(f"{owner}.g_idx"), scale.shape
    # Layers may have widths of their own ("dynamic").
    num_in = group.shape[0] if group is not None else packed.shape[0] * WORD_BITS // bits
    bits = packed.shape[0] * WORD_BITS // num_in
    fits = MIN_BITS <= bits <= MAX_BITS and packed.shape == (num_words(num_in, bits), num_out)
    if not fits or zero.shape != (num_groups, num_words(num_out, bits)):
        raise ValueError(
            f"{owner} has qweight {list(packed.shape)} and qzeros {list(zero.shape)} for scales {list(scale.shape)}, "
            "which is no layout of GPTQ that is read; dequantize the source first"
        )
    row_O, even_I = grid_of(owner, (num_out, num_in), (num_out, num_groups), None)

    def make() -> Tensor:
        codes_OI = unpack(packed.read().mT, bits, num_in)
        zero_GO = (unpack(zero.read(), bits, num_out) + less) & (2**bits - 1)
        group_I = even_I if group is None else group.read().long()
        return dequantize(codes_OI, scale.read().mT, zero_GO.mT, row_O, group_I, dtype)

    return Dequantized(f"{owner}.weight", dtype, (num_out, num_in), parts_of(packed, zero, scale, group), make)


def read_awq(
    stored: Mapping[str, Readable], description: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Dequantized]]:
    """Weights of AWQ by key, dequantized; see ``moeq.checkpoint.dequantized``.

    Raises:
        ValueError: Parts of a weight are missing or do not fit each other.
    """
    del description
    for key in stored:
        if key.endswith(".qweight"):
            owner = key.removesuffix(".qweight")
            yield f"{owner}.weight", _awq(owner, stored, dtype)


def _awq(owner: str, stored: Mapping[str, Readable], dtype: torch.dtype) -> Dequantized:
    packed, zero, scale = (_part(stored, owner, leaf) for leaf in ("qweight", "qzeros", "scales"))
    num_in, (num_groups, num_out) = packed.shape[0], scale.shape
    if packed.shape[1] * 8 != num_out or zero.shape != (num_groups, packed.shape[1]):
        raise ValueError(
            f"{owner} has qweight {list(packed.shape)} and qzeros {list(zero.shape)} for scales {list(scale.shape)}, "
            "which is no layout of AWQ that is read; dequantize the source first"
        )
    row_O, group_I = grid_of(owner, (num_out, num_in), (num_out, num_groups), None)

    def make() -> Tensor:
        codes_IO, zero_GO = (_awq_codes(tensor.read(), num_out) for tensor in (packed, zero))
        return dequantize(codes_IO.mT, scale.read().mT, zero_GO.mT, row_O, group_I, dtype)

    return Dequantized(f"{owner}.weight", dtype, (num_out, num_in), parts_of(packed, zero, scale), make)


def _awq_codes(packed: Tensor, num: int) -> Tensor:
    """Codes of words of AWQ, [..., num] in the order of the features."""
    eights = unpack(packed, 4, num).unflatten(-1, (-1, 8))
    return eights[..., torch.tensor(AWQ_ORDER).argsort()].flatten(-2)


def _part(stored: Mapping[str, Readable], owner: str, leaf: str) -> Readable:
    if f"{owner}.{leaf}" not in stored:
        raise ValueError(f"{owner} is quantized and has no {leaf} in the files; copy the source again")
    return stored[f"{owner}.{leaf}"]
