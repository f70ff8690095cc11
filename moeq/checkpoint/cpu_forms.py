"""The two forms of a packed weight on a CPU: for the operation on codes of 4 bits, and as planes of bits.

``NibbleForm`` multiplies few rows without ever making the weight:

    (code - zero) scale = (nibble - 8) scale + (2^(bits - 1) - zero) scale,    nibble = code + 8 - 2^(bits - 1)

Codes of more than 4 bits are two sets of nibbles, of the 4 highest bits and of the others.  The offset is rounded to bfloat16 where the zero point is not in the middle, and weights are not rounded, as those of
the reference are; both differences are within half a unit of bfloat16 in the largest weights of a group.

Many rows take the weight itself, made in a buffer that all weights share, by the reference's formula to the bit.

Shapes: M rows of the input, O out features, I in features, G groups of a row, B rows of a block, S in features of a
group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.kernels.bit_planes import MULTIPLE, join_planes, split_planes
from moeq.kernels.compute_dtype import has_bfloat16_products
from moeq.kernels.crossover import FEW_ROWS
from moeq.kernels.nibbles import GROUP_SIZES, ROWS, arrangement, nibble_product, pack_nibbles, unpack_block
from moeq.kernels.workspace import reused
from moeq.quant.kinds import TWO_LEVEL
from moeq.quant.spec import QuantizedWeight

# Weights that are dequantized at once, so that what is between stays in the cache of a core.
CHUNK = 1 << 17
_NONE = torch.empty(0)


@dataclass(frozen=True)
class PlaneForm:
    """Codes and zero points as planes of bits, in features first.

    Attributes:
        frame: The weight without its tensors.
        planes: Of the codes.
        zero_planes: Of the zero points [G, O]; empty on a symmetric grid.
        scale_GO: As stored.
    """

    frame: QuantizedWeight
    planes: tuple[Tensor, ...]
    zero_planes: tuple[Tensor, ...]
    scale_GO: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "PlaneForm":
        """That of a weight for which ``why_no_planes`` is None."""
        zero_OG = weight.zero_point_OG
        return cls(
            _frame(weight),
            split_planes(weight.codes_OI.mT.contiguous(), weight.bits),
            () if zero_OG is None else split_planes(zero_OG.mT.contiguous(), weight.bits),
            weight.scale_OG.mT.contiguous(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in (*self.planes, *self.zero_planes, self.scale_GO))

    def product(self, x_MI: Tensor) -> Tensor:
        """x W^T, [M, O]."""
        return _by_dense(x_MI, self.weight(_product_dtype(x_MI.dtype)))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight, [I, O], in the reused buffer: valid until the next one is made."""
        (groups, rows), columns = self.scale_GO.shape, len(self.planes[0])
        weight_IO, zero_GO = reused("weight", (columns, rows), dtype), self._zero()
        size = columns // groups
        step = max(1, CHUNK // (rows * size))
        for first in range(0, groups, step):
            part, span = slice(first, first + step), slice(first * size, (first + step) * size)
            out_GSO = weight_IO[span].view(-1, size, rows)
            code_IO = reused("code", (out_GSO.shape[0] * size, rows), torch.uint8)
            join_planes([plane[span] for plane in self.planes], self.frame.bits, code_IO, _like(code_IO))
            zero_G1O = None if zero_GO is None else zero_GO[part].unsqueeze(1)
            code_GSO = code_IO.view(out_GSO.shape)
            dequantize_chunk(code_GSO, zero_G1O, self.scale_GO[part].unsqueeze(1), self.frame.bits, out_GSO)
        return weight_IO

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        code_IO = torch.empty(len(self.planes[0]), self.scale_GO.shape[1], dtype=torch.uint8)
        join_planes(self.planes, self.frame.bits, code_IO, torch.empty_like(code_IO))
        zero_GO = self._zero()
        return replace(
            self.frame,
            codes_OI=code_IO.mT.contiguous(),
            scale_OG=self.scale_GO.mT.contiguous(),
            zero_point_OG=None if zero_GO is None else zero_GO.mT.contiguous(),
        )

    def _zero(self) -> Tensor | None:
        if not self.zero_planes:
            return None
        zero_GO = torch.empty(self.scale_GO.shape, dtype=torch.uint8)
        join_planes(self.zero_planes, self.frame.bits, zero_GO, torch.empty_like(zero_GO))
        return zero_GO


@dataclass(frozen=True)
class NibbleForm:
    """Codes as the operation on 4 bits takes them.

    Attributes:
        frame: The weight without its tensors.
        columns: I.
        group_size: Of the operation, which divides that of the weight.
        packed: uint8, [O, I / 2]; of more than 4 bits [2 O, I / 2], the higher halves of the codes above the lower.
        scale_offset_GO2: bfloat16, for the rows of ``packed``.
    """

    frame: QuantizedWeight
    columns: int
    group_size: int
    packed: Tensor
    scale_offset_GO2: Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "NibbleForm":
        """That of a weight for which ``why_no_nibbles`` is None."""
        columns, bits, middle = weight.codes_OI.shape[1], weight.bits, 2 ** (weight.bits - 1)
        group_size = _operation_group(weight.group_size, columns)
        assert group_size is not None
        repeats = columns // weight.scale_OG.shape[1] // group_size
        scale_OG = weight.scale_OG.float()
        shift_OG = torch.zeros_like(scale_OG) if weight.zero_point_OG is None else middle - weight.zero_point_OG.float()
        if bits <= 4:
            code_OI, offset_OG = weight.codes_OI + (8 - middle), shift_OG * scale_OG
        else:
            lowest, half = 2 ** (bits - 4), 2 ** (bits - 4) / 2
            code_OI = torch.cat([weight.codes_OI // lowest, weight.codes_OI % lowest + int(8 - half)])
            higher_OG = (shift_OG / lowest).round()
            offset_OG = torch.cat([lowest * higher_OG, shift_OG - lowest * higher_OG + half]) * scale_OG.repeat(2, 1)
            scale_OG = torch.cat([lowest * scale_OG, scale_OG])
        scale_offset_OG2 = torch.stack([scale_OG, offset_OG], -1).bfloat16().repeat_interleave(repeats, 1)
        return cls(
            _frame(weight), columns, group_size, pack_nibbles(code_OI), scale_offset_OG2.transpose(0, 1).contiguous()
        )

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scale_offset_GO2.nbytes

    def product(self, x_MI: Tensor) -> Tensor:
        """x W^T, [M, O]; few rows by the operation."""
        few = 0 < len(x_MI) <= FEW_ROWS and x_MI.dtype == torch.bfloat16
        return self.by_operation(x_MI) if few else self.by_weight(x_MI)

    def by_operation(self, x_MI: Tensor) -> Tensor:
        """The product without the weight, of rows in bfloat16."""
        y_MO = nibble_product(x_MI.contiguous(), self.packed, self.group_size, self.scale_offset_GO2)
        if self.frame.bits <= 4:
            return y_MO
        higher_MO, lower_MO = y_MO.chunk(2, 1)
        return higher_MO + lower_MO

    def by_weight(self, x_MI: Tensor) -> Tensor:
        """The product with the weight."""
        return _by_dense(x_MI, self.weight(_product_dtype(x_MI.dtype)))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight, [I, O], in the reused buffer: valid until the next one is made."""
        weight_IO = reused("weight", (self.columns, self._rows), dtype)
        scale_GO, zero_GO = self._scale_and_zero()
        order = arrangement()
        assert order is not None
        for first in range(0, self._rows, order.block):
            part = slice(first, first + order.block)
            code_IB = reused("code", (self.columns, order.block), torch.uint8)
            self._codes(first, code_IB)
            shape_GSB = (len(scale_GO), -1, order.block)
            zero_G1B = None if zero_GO is None else zero_GO[:, part].unsqueeze(1)
            out_GSB = weight_IO.view(len(scale_GO), -1, self._rows)[..., part]
            scale_G1B = scale_GO[:, part].unsqueeze(1)
            dequantize_chunk(code_IB.view(shape_GSB), zero_G1B, scale_G1B, self.frame.bits, out_GSB)
        return weight_IO

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        code_IO = torch.empty(self.columns, self._rows, dtype=torch.uint8)
        order = arrangement()
        assert order is not None
        for first in range(0, self._rows, order.block):
            self._codes(first, code_IO[:, first : first + order.block])
        scale_GO, zero_GO = self._scale_and_zero()
        return replace(
            self.frame,
            codes_OI=code_IO.mT.contiguous(),
            scale_OG=scale_GO.mT.contiguous(),
            zero_point_OG=None if zero_GO is None else zero_GO.mT.contiguous(),
        )

    @property
    def _rows(self) -> int:
        return len(self.packed) // (1 if self.frame.bits <= 4 else 2)

    def _codes(self, first: int, out_IB: Tensor) -> None:
        """Codes of the block from a row on, written."""
        order, bits = arrangement(), self.frame.bits
        assert order is not None
        unpack_block(self.packed, order, first // order.block, out_IB)
        if bits > 4:
            lower_IB = _like(out_IB)
            unpack_block(self.packed, order, (self._rows + first) // order.block, lower_IB)
            out_IB.bitwise_left_shift_(bits - 4).add_(lower_IB.sub_(8 - 2 ** (bits - 4) // 2))
        else:
            out_IB.sub_(8 - 2 ** (bits - 1))

    def _scale_and_zero(self) -> tuple[Tensor, Tensor | None]:
        """Scales as stored, and zero points, uint8; both [G, O]."""
        groups = 1 if self.frame.group_size is None else self.columns // self.frame.group_size
        scale_GO, offset_GO = self.scale_offset_GO2[:: len(self.scale_offset_GO2) // groups].unbind(-1)
        stored_GO = scale_GO[:, -self._rows :].contiguous()
        if self.frame.zero_point_OG is None:
            return stored_GO, None
        shift_GO = (offset_GO.float() / scale_GO.float()).round_()
        if self.frame.bits > 4:
            higher_GO, lower_GO = shift_GO.chunk(2, 1)
            lowest = 2 ** (self.frame.bits - 4)
            shift_GO = lowest * higher_GO + lower_GO - lowest // 2
        return stored_GO, (2 ** (self.frame.bits - 1) - shift_GO).to(torch.uint8)


def dequantize_chunk(code: Tensor, zero: Tensor | None, scale: Tensor, bits: int, out: Tensor) -> None:
    """``(code - zero) scale``, rounded to the dtype of the scales, as ``moeq.quant.grid.dequantize_weight`` gives it.

    Levels are whole numbers of at most 8 bits and exact in every dtype; one product of two numbers of that dtype is
    rounded once.

    Args:
        code: uint8, contiguous; overwritten.
        zero: uint8, broadcasts; None for the middle of the grid.
        scale: Broadcasts.
        bits: Of the codes.
        out: Written; any dtype that holds the values.
    """
    values = out if out.dtype == scale.dtype else reused("values", tuple(code.shape), scale.dtype)
    if bits == 8 and zero is not None:  # differences of more than int8 holds
        values.copy_(code).sub_(zero.to(scale.dtype))
    else:
        code.sub_(2 ** (bits - 1) if zero is None else zero)
        values.copy_(code.view(torch.int8))
    values.mul_(scale)
    if values is not out:
        out.copy_(values)


def why_no_planes(grid: PackedFormat, shape: tuple[int, int]) -> str | None:
    """Why a weight cannot be planes of bits."""
    if grid.kind in TWO_LEVEL:
        return "two-level grid"
    return f"out features not in multiples of {MULTIPLE}" if shape[0] % MULTIPLE else None


def why_no_nibbles(
    grid: PackedFormat, shape: tuple[int, int], weight_dtype: torch.dtype, dtype: torch.dtype
) -> str | None:
    """Why the operation on 4 bits does not take a weight."""
    if reason := why_no_planes(grid, shape):
        return reason
    if (dtype, weight_dtype) != (torch.bfloat16, torch.bfloat16):
        return "not in bfloat16"
    if shape[0] % ROWS or _operation_group(grid.group_size, shape[1]) is None:
        return f"out features not in multiples of {ROWS}, or groups not of {GROUP_SIZES[-1]}"
    return None if arrangement() is not None else "no operation on 4 bits"


def nibble_bytes(grid: PackedFormat, shape: tuple[int, int]) -> int:
    """Bytes of a ``NibbleForm``."""
    (rows, columns), sets = shape, 1 if grid.bits <= 4 else 2
    return sets * rows * (columns // 2 + 4 * columns // (_operation_group(grid.group_size, columns) or columns))


def _operation_group(group_size: int | None, columns: int) -> int | None:
    """The largest group that the operation knows and that divides those of the weight."""
    return next((size for size in GROUP_SIZES if (group_size or columns) % size == 0), None)


def _by_dense(x_MI: Tensor, weight_IO: Tensor) -> Tensor:
    return (x_MI.to(weight_IO.dtype) @ weight_IO).to(x_MI.dtype)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies: bfloat16 is emulated slowly where it has no such products."""
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16_products() else dtype


def _frame(weight: QuantizedWeight) -> QuantizedWeight:
    zero = None if weight.zero_point_OG is None else _NONE
    return replace(weight, codes_OI=_NONE, scale_OG=_NONE, zero_point_OG=zero)


def _like(code: Tensor) -> Tensor:
    return reused("second code", tuple(code.shape), torch.uint8)
