"""Forms of a packed weight in bfloat16 for torch's operation on codes of 4 bits, which few rows take.

    (code - zero) scale = (nibble - 8) scale + (2^(bits - 1) - zero) scale,    nibble = code + 8 - 2^(bits - 1)

Codes of more than 4 bits are two sets of nibbles, of the 4 highest bits and of the others.  The offset is rounded to
bfloat16 where the zero point is not in the middle, and weights are not rounded, as those of the reference are; both
differences are within half a unit of bfloat16 in the largest weights of a group.  Many rows take the weight itself, by
the reference's formula to the bit.

``NibbleForm`` holds what the operation reads; ``SqueezedForm`` as many bytes as the file, of which it makes the other
at every call.

Shapes: M rows of the input, O out features, I in features, G groups of a row, B rows of a block, H half of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.plane_form import (
    by_weight,
    frame_of,
    joined_zero,
    make_weight,
    product_dtype,
    second_code,
    transposed,
    why_no_planes,
)
from moeq.kernels.bit_planes import split_planes
from moeq.kernels.crossover import FEW_ROWS
from moeq.kernels.nibbles import (
    GROUP_SIZES,
    ROWS,
    arrangement,
    nibble_product,
    pack_nibbles,
    unpack_rows,
)
from moeq.kernels.squeezed import spread, squeeze
from moeq.kernels.workspace import reused
from moeq.quant.spec import QuantizedWeight


@dataclass(frozen=True)
class NibbleForm:
    """What the operation reads.

    Attributes:
        frame: The weight without its tensors.
        columns: I.
        group_size: Of the operation, which divides that of the weight.
        packed: uint8, [O, I / 2]; of more than 4 bits [2 O, I / 2], the higher set above the lower.
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
        columns, bits = weight.codes_OI.shape[1], weight.bits
        if bits <= 4:
            code_OI = weight.codes_OI + _added(bits)[0]
        else:
            higher, lower = _added(bits)
            code_OI = torch.cat(
                [weight.codes_OI // 2 ** (bits - 4) + higher, weight.codes_OI % 2 ** (bits - 4) + lower]
            )
        zero_GO = None if weight.zero_point_OG is None else weight.zero_point_OG.mT
        scale_offset_GO2 = _scale_and_offset(weight.scale_OG.mT, zero_GO, weight, columns)
        group_size = _operation_group(weight.group_size, columns)
        return cls(frame_of(weight), columns, group_size, pack_nibbles(code_OI), scale_offset_GO2)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scale_offset_GO2.nbytes

    def product(self, x_MI: Tensor) -> Tensor:
        """Product with the weight, [M, O]; few rows by the operation."""
        few = 0 < len(x_MI) <= FEW_ROWS and x_MI.dtype == torch.bfloat16
        return self.by_operation(x_MI) if few else self.by_weight(x_MI)

    def by_operation(self, x_MI: Tensor) -> Tensor:
        """The product without the weight, of rows in bfloat16."""
        y_MO = nibble_product(x_MI.contiguous(), self.packed, self.group_size, self.scale_offset_GO2.contiguous())
        if self.frame.bits <= 4:
            return y_MO
        higher_MO, lower_MO = y_MO.chunk(2, 1)
        return higher_MO + lower_MO

    def by_weight(self, x_MI: Tensor) -> Tensor:
        """The product with the weight."""
        return by_weight(x_MI, self.weight(product_dtype(x_MI.dtype)))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight, [I, O], in the reused buffer: valid until the next one is made."""
        scale_GO, zero_GO = self.scale_and_zero()
        return make_weight(self.columns, self.frame.bits, scale_GO, zero_GO, dtype, self._codes)

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        code_IO = torch.empty(self.columns, self.rows, dtype=torch.uint8)
        self._codes(slice(None), code_IO)
        scale_GO, zero_GO = self.scale_and_zero()
        return replace(
            self.frame,
            codes_OI=code_IO.mT.contiguous(),
            scale_OG=scale_GO.mT.contiguous(),
            zero_point_OG=None if zero_GO is None else zero_GO.mT.contiguous(),
        )

    @property
    def rows(self) -> int:
        """O."""
        return len(self.packed) // (1 if self.frame.bits <= 4 else 2)

    def _codes(self, part: slice, out_IO: Tensor) -> None:
        """Codes of some in features, written."""
        order, bits = arrangement(), self.frame.bits
        assert order is not None
        unpack_rows(self.packed[: self.rows], order, part, out_IO)
        out_IO.sub_(_added(bits)[0])
        if bits > 4:
            lower_IO = second_code(out_IO)
            unpack_rows(self.packed[self.rows :], order, part, lower_IO)
            out_IO.bitwise_left_shift_(bits - 4).add_(lower_IO.sub_(_added(bits)[1]))

    def scale_and_zero(self) -> tuple[Tensor, Tensor | None]:
        """Scales as stored, and zero points, uint8; both [G, O]."""
        groups = 1 if self.frame.group_size is None else self.columns // self.frame.group_size
        scale_GO, offset_GO = self.scale_offset_GO2[:: len(self.scale_offset_GO2) // groups].unbind(-1)
        stored_GO = scale_GO[:, -self.rows :].contiguous()
        if self.frame.zero_point_OG is None:
            return stored_GO, None
        shift_GO = (offset_GO.float() / scale_GO.float()).round_()
        if self.frame.bits > 4:
            higher_GO, lower_GO = shift_GO.chunk(2, 1)
            lowest = 2 ** (self.frame.bits - 4)
            shift_GO = lowest * higher_GO + lower_GO - lowest // 2
        return stored_GO, (2 ** (self.frame.bits - 1) - shift_GO).to(torch.uint8)


@dataclass(frozen=True)
class SqueezedForm:
    """As many bytes as the file.

    Attributes:
        frame: The weight without its tensors.
        columns: I.
        sets: Planes of each set of nibbles; one plane where all bits of all sets are used.
        scale_GO: As stored.
        zero_planes: Planes of the zero points [G, O]; empty on a symmetric grid.
    """

    frame: QuantizedWeight
    columns: int
    sets: tuple[tuple[Tensor, ...], ...]
    scale_GO: Tensor
    zero_planes: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "SqueezedForm":
        """That of a weight for which ``why_no_nibbles`` is None."""
        whole, bits = NibbleForm.of(weight), weight.bits
        parts = zip(whole.packed.chunk(len(_widths(bits))), _widths(bits), _added(bits), strict=True)
        sets = tuple(squeeze(octets - 0x11 * added, width) for octets, width, added in parts)
        if set(_widths(bits)) == {4}:
            sets = ((whole.packed.flatten(),),)
        zero_OG = weight.zero_point_OG
        return cls(
            whole.frame,
            whole.columns,
            sets,
            transposed(weight.scale_OG),
            () if zero_OG is None else split_planes(zero_OG.mT.contiguous(), bits),
        )

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        planes = (plane for planes in self.sets for plane in planes)
        return sum(tensor.nbytes for tensor in (*planes, *self.zero_planes, self.scale_GO))

    def product(self, x_MI: Tensor) -> Tensor:
        """Product with the weight, [M, O]."""
        return self.whole().product(x_MI)

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        return self.whole().quantized()

    def whole(self) -> NibbleForm:
        """What the operation reads, in reused buffers: valid until the next one is made."""
        bits, rows = self.frame.bits, self.scale_GO.shape[1]
        widths, added = _widths(bits), _added(bits)
        if set(widths) == {4}:
            packed = self.sets[0][0].view(-1, self.columns // 2)
        else:
            packed = reused("packed", (len(widths) * rows, self.columns // 2), torch.uint8)
            for octets, planes, width, each in zip(packed.chunk(len(widths)), self.sets, widths, added, strict=True):
                spread(planes, width, each, octets)
        scale_offset_GO2 = _scale_and_offset(
            self.scale_GO, joined_zero(self.zero_planes, self.frame.bits, self.scale_GO), self.frame, self.columns
        )
        group_size = _operation_group(self.frame.group_size, self.columns)
        return NibbleForm(self.frame, self.columns, group_size, packed, scale_offset_GO2)


def why_no_nibbles(
    grid: PackedFormat, shape: tuple[int, int], weight_dtype: torch.dtype, dtype: torch.dtype
) -> str | None:
    """Why the operation on 4 bits does not take a weight."""
    if reason := why_no_planes(grid, shape):
        return reason
    if grid.bits == 1:
        return "levels that are no whole numbers"
    if (dtype, weight_dtype) != (torch.bfloat16, torch.bfloat16):
        return "not in bfloat16"
    if shape[0] % ROWS or (grid.group_size or shape[1]) % GROUP_SIZES[-1]:
        return f"out features not in multiples of {ROWS}, or groups not of {GROUP_SIZES[-1]}"
    return None if arrangement() is not None else "no operation on 4 bits"


def nibble_bytes(grid: PackedFormat, shape: tuple[int, int]) -> int:
    """Bytes of a ``NibbleForm``."""
    rows, columns = shape
    return len(_widths(grid.bits)) * rows * (columns // 2 + 4 * columns // _operation_group(grid.group_size, columns))


def _scale_and_offset(scale_GO: Tensor, zero_GO: Tensor | None, frame: QuantizedWeight, columns: int) -> Tensor:
    """Scales and offsets of a weight's sets of nibbles, for the groups of the operation; bfloat16, [G, sets O, 2]."""
    bits, middle = frame.bits, 2 ** (frame.bits - 1)
    shift_GO = torch.zeros_like(scale_GO) if zero_GO is None else middle - zero_GO.to(scale_GO.dtype)
    if bits > 4:
        lowest = 2 ** (bits - 4)
        higher_GO = (shift_GO / lowest).round_()
        # The lower nibbles are counted from their middle, the codes of their bits from nothing.
        shift_GO = torch.cat([higher_GO, shift_GO - lowest * higher_GO + lowest // 2], 1)
        scale_GO = torch.cat([lowest * scale_GO, scale_GO], 1)
    scale_offset_GO2 = torch.empty(*shift_GO.shape, 2, dtype=torch.bfloat16)
    scale_offset_GO2[..., 0] = scale_GO
    torch.mul(shift_GO, scale_GO, out=scale_offset_GO2[..., 1])
    repeats = columns // len(scale_offset_GO2) // _operation_group(frame.group_size, columns)
    return scale_offset_GO2 if repeats == 1 else scale_offset_GO2.repeat_interleave(repeats, 0)


def _widths(bits: int) -> tuple[int, ...]:
    """Bits of the nibbles of each set."""
    return (bits,) if bits <= 4 else (4, bits - 4)


def _added(bits: int) -> tuple[int, ...]:
    """What is added to the bits of each set, whose middle is 8."""
    return tuple(8 - 2 ** (width - 1) for width in _widths(bits))


def _operation_group(group_size: int | None, columns: int) -> int:
    """The largest group that the operation knows and that divides those of the weight."""
    return next(size for size in GROUP_SIZES if (group_size or columns) % size == 0)
