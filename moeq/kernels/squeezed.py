"""Bytes of two nibbles with few bits each, squeezed into as many bits as they have.

A nibble of w bits below 4 leaves holes in its byte, and bytes that lie a half or a quarter of the array apart fill the
holes of one another.  Taking them apart is a few operations on whole arrays of words, five times as fast as to make a
weight in bfloat16.  Whole nibbles stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Widths of the planes of a nibble, lowest bits first; a plane is w / 4 of the bytes.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}
_EACH = 0x11111111  # a bit of every nibble of a word


def squeeze(octets: Tensor, width: int) -> tuple[Tensor, ...]:
    """Planes of bytes of two nibbles.

    Args:
        octets: uint8, any shape, each nibble below 2^width; their number in multiples of 16.
        width: 1 to 4.

    Returns:
        uint8, one dimension each, ``width / 4`` of the bytes in all.
    """
    planes, first = [], 0
    for bits in _PLANES[width]:
        part = (octets.flatten() >> first) & (0x11 * (2**bits - 1))
        plane = torch.zeros_like(part[: part.numel() * bits // 4])
        for i, run in enumerate(part.chunk(4 // bits)):
            plane |= run << (i * bits)
        planes.append(plane)
        first += bits
    return tuple(planes)


def spread(planes: Sequence[Tensor], width: int, added: int, out: Tensor) -> None:
    """The inverse of ``squeeze``.

    Args:
        planes: From ``squeeze``.
        width: As there.
        added: To every nibble, none of which may pass 15 by it.
        out: uint8, contiguous, written.
    """
    words, first = out.view(-1).view(torch.int32), 0
    for plane, bits in zip(planes, _PLANES[width], strict=True):
        mask, packed = _EACH * (2**bits - 1) if bits < 4 else -1, plane.view(torch.int32)
        for i, run in enumerate(words.chunk(4 // bits)):
            # The sign that a shift of a negative word brings in lies outside of the mask.
            target = torch.empty_like(run) if first else run
            torch.bitwise_right_shift(packed, i * bits, out=target).bitwise_and_(mask)
            if first:
                run.bitwise_or_(target.bitwise_left_shift_(first))
        first += bits
    if added:
        words.add_(added * _EACH)
