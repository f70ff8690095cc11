"""Dense packing of b-bit codes into int32 words: code i of a row occupies bits [i b, (i + 1) b) of the row's stream.

The stream is little-endian, codes may straddle words, and a row is padded with zeros to whole words.  The layout is the
one of compressed-tensors 0.20 (``pack_quantized/helpers.py``), which stores q + 2^(b - 1) for a signed q: our code.
Eight codes fill exactly b bytes, so that both directions work on groups of eight.  Needs a little-endian host.

Shape suffixes: O out, I in, W words.
"""

import torch
from torch import Tensor

from moeq.quant.spec import MAX_BITS, MIN_BITS

_GROUP = 8  # codes per group; a group is exactly `bits` bytes


def num_words(num: int, bits: int) -> int:
    """int32 words that hold ``num`` codes of ``bits`` bits."""
    return -(-num * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8, [..., I], each in [0, 2^bits); higher values would spill into their neighbours.
        bits: 1 to 8.

    Returns:
        int32, [..., ceil(I bits / 32)].

    Raises:
        ValueError: The width is out of range, or the codes are not uint8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; pack takes torch.uint8")
    num = codes.shape[-1]
    # 32 codes are exactly `bits` words, so that padding to 32 keeps the byte stream whole.
    groups = torch.nn.functional.pad(codes, (0, -num % 32)).unflatten(-1, (-1, _GROUP))
    octets = groups.new_zeros(*groups.shape[:-1], bits)
    for i, (first, shift, straddles) in enumerate(_positions(bits)):
        octets[..., first] |= groups[..., i] << shift
        if straddles:
            octets[..., first + 1] |= groups[..., i] >> (8 - shift)
    return octets.flatten(-2).view(torch.int32)[..., : num_words(num, bits)].contiguous()


def unpack(packed: Tensor, bits: int, num: int) -> Tensor:
    """Inverse of ``pack``.

    Args:
        packed: int32, [..., W] with W = ceil(num bits / 32).
        bits: 1 to 8.
        num: I, codes per row.

    Returns:
        uint8, [..., num].

    Raises:
        ValueError: The width is out of range, or the words do not fit ``num`` codes.
    """
    _check_bits(bits)
    if packed.dtype != torch.int32 or packed.shape[-1] != num_words(num, bits):
        raise ValueError(
            f"packed weight is {packed.dtype} with {packed.shape[-1]} words a row; "
            f"{num} codes of {bits} bits take {num_words(num, bits)} words of torch.int32"
        )
    # Flattened first: a last dimension of one word may have any stride, which a view as bytes refuses.
    octets = packed.contiguous().flatten().view(torch.uint8).view(*packed.shape[:-1], 4 * packed.shape[-1])
    if bits == 8:
        return octets[..., :num].clone()
    if 8 % bits == 0:
        parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :num].contiguous()
    octets = torch.nn.functional.pad(octets, (0, -octets.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = []
    for first, shift, straddles in _positions(bits):
        code = octets[..., first] >> shift
        if straddles:
            code = code | (octets[..., first + 1] << (8 - shift))
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, dim=-1).flatten(-2)[..., :num].contiguous()


def _positions(bits: int) -> list[tuple[int, int, bool]]:
    """For each code of a group: its first byte, the bit it starts at, and whether it reaches into the next byte."""
    starts = (divmod(i * bits, 8) for i in range(_GROUP))
    return [(first, shift, shift + bits > 8) for first, shift in starts]


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits ({bits}) must be between {MIN_BITS} and {MAX_BITS}; choose 2, 3, 4 or 8")
