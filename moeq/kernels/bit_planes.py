"""Codes of b bits as planes of 8, 4, 2 and 1 bits, which a processor takes apart in long runs.

Codes are [I, O], in features first, so that the scales of a group are one row, and rows of codes are as wide as the
weight.  A plane of w bits holds w bits of every code: byte j of a row has those of the out features j, j + O w / 8, ...
in its bits from the lowest on, so that each of its 8 / w parts is a run of O w / 8 neighbours.  All planes together are
b / 8 bytes a weight, as many as the packed words of a file.

Shapes: O out features in multiples of 8, I in features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 8  # of the out features
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # lowest bits first


def split_planes(code_IO: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Planes of codes.

    Args:
        code_IO: uint8, each in [0, 2^bits), O in multiples of 8.
        bits: 1 to 8.

    Returns:
        uint8 tensors, [I, O w / 8] for each width w of ``bits``.
    """
    planes, offset = [], 0
    for width in _PLANES[bits]:
        part_IO = (code_IO >> offset) & (2**width - 1)
        offset += width
        plane = torch.zeros_like(part_IO[:, : code_IO.shape[1] * width // 8])
        for i, run in enumerate(part_IO.chunk(8 // width, 1)):
            plane |= run << (width * i)
        planes.append(plane)
    return tuple(planes)


def join_planes(planes: Sequence[Tensor], bits: int, out_IO: Tensor, work_IO: Tensor) -> None:
    """The inverse of ``split_planes``.

    Args:
        planes: Some or all rows of each plane.
        bits: 1 to 8.
        out_IO: uint8, contiguous, written.
        work_IO: uint8 of the same shape, overwritten.
    """
    offset = 0
    for plane, width in zip(planes, _PLANES[bits], strict=True):
        target_IO = work_IO if offset else out_IO
        _spread(plane, width, target_IO)
        if offset:
            out_IO.bitwise_or_(target_IO.bitwise_left_shift_(offset))
        offset += width


def _spread(plane: Tensor, width: int, out_IO: Tensor) -> None:
    runs = out_IO.chunk(8 // width, 1)
    for i, run in enumerate(runs):
        if i == 0:
            run.copy_(plane)
        else:
            torch.bitwise_right_shift(plane, width * i, out=run)
    if len(runs) > 1:
        out_IO.bitwise_and_(2**width - 1)
