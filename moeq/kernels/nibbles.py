"""Products of few rows with weights of 4 bits on a CPU, by the operation that torch has for them.

    y = x W^T,    W = (code - 8) scale + offset,    code in 0 .. 15, a scale and an offset for each group of a row

The operation reads half a byte per weight and multiplies in float32, so that products that wait for memory take about a
quarter of bfloat16's time.  It has a fast path for inputs in bfloat16 only, rounds the result to bfloat16, and is
slower than a dense product from some tens of rows on.  How it arranges the codes is its own affair and differs between
processors: ``arrangement`` finds out by packing numbered rows.

Shapes: M rows of the input, O out features, I in features, G groups of a row, N blocks of B rows.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

GROUP_SIZES = (256, 128, 64, 32)  # those that the operation knows
ROWS = 64  # out features come in multiples of it
_AT_ONCE = 1024  # rows whose codes are int32 at once
# Argument of the packing operation that its version for CPUs does not read.
_UNUSED = 2


@dataclass(frozen=True)
class Arrangement:
    """Codes packed by the operation are [O / block, I, block / 2] bytes.

    Attributes:
        block: Rows of a block.
        low: Rows of a block whose codes are the low halves of its bytes.
        high: Those of the high halves.
    """

    block: int
    low: slice
    high: slice


@cache
def arrangement() -> Arrangement | None:
    """How this processor's operation arranges codes; None where there is no such operation, or it is not understood."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    row_O = torch.arange(ROWS, dtype=torch.uint8).unsqueeze(1).expand(ROWS, 32)
    digits = [_pack(digit.contiguous()) for digit in (row_O % 16, row_O // 16)]
    for block in (64, 32):
        ones, sixteens = (digit.view(-1, 32, block // 2)[0] for digit in digits)
        halves = [(ones & 15) + 16 * (sixteens & 15), (ones >> 4) + 16 * (sixteens >> 4)]
        if all((half == half[:1]).all() and int(half.max()) < block for half in halves):
            low, high = (_as_slice(half[0].tolist()) for half in halves)
            if low is not None and high is not None and _holds(found := Arrangement(block, low, high)):
                return found
    return None


def pack_nibbles(code_OI: Tensor) -> Tensor:
    """Codes as the operation wants them.

    Args:
        code_OI: uint8 in 0 .. 15, O in multiples of ``ROWS``, I even.

    Returns:
        uint8, [O, I / 2].
    """
    return torch.cat([_pack(part_OI) for part_OI in code_OI.split(_AT_ONCE)])


def known_arrangement() -> Arrangement:
    """``arrangement()`` where there is one."""
    order = arrangement()
    assert order is not None
    return order


def unpack_rows(packed_OH: Tensor, order: Arrangement, part: slice, out_IO: Tensor) -> None:
    """Codes of some in features, in features first.

    Args:
        packed_OH: From ``pack_nibbles``.
        order: ``arrangement()``.
        part: Which in features.
        out_IO: uint8, contiguous, written.
    """
    blocks = len(packed_OH) // order.block
    octets_INH = packed_OH.view(blocks, -1, order.block // 2)[:, part].transpose(0, 1)
    out_INB = out_IO.view(-1, blocks, order.block)
    torch.bitwise_and(octets_INH, 15, out=out_INB[..., order.low])
    torch.bitwise_right_shift(octets_INH, 4, out=out_INB[..., order.high])


def nibble_product(x_MI: Tensor, packed_OH: Tensor, group_size: int, scale_offset_GO2: Tensor) -> Tensor:
    """Product with the weight, [M, O].

    Args:
        x_MI: bfloat16, contiguous.
        packed_OH: From ``pack_nibbles``.
        group_size: One of ``GROUP_SIZES``.
        scale_offset_GO2: bfloat16, scale and offset of each group.
    """
    y_MO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI, packed_OH, group_size, scale_offset_GO2)
    return y_MO


def _pack(code_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_OI.int(), _UNUSED)
    return packed


def _as_slice(rows: list[int]) -> slice | None:
    step = rows[1] - rows[0]
    return slice(rows[0], rows[-1] + 1, step) if step > 0 and rows == [*range(rows[0], rows[-1] + 1, step)] else None


def _holds(order: Arrangement) -> bool:
    """Whether what was found of numbered rows holds for any codes."""
    code_OI = (torch.arange(2 * ROWS * 32) * 7919 // 13 % 16).to(torch.uint8).view(2 * ROWS, 32)
    code_IO = torch.empty(32, 2 * ROWS, dtype=torch.uint8)
    unpack_rows(pack_nibbles(code_OI), order, slice(None), code_IO)
    return torch.equal(code_IO.mT, code_OI)
