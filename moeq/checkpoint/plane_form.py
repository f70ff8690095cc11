"""A packed weight as planes of bits, for every dtype: as many bytes as the file, and the weight is made at every call.

It is made in a buffer that all weights share, by the reference's formula to the bit, some groups at a time.

Shapes: M rows of the input, O out features, I in features, G groups of a row, S in features of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.kernels.bit_planes import MULTIPLE, join_planes, split_planes
from moeq.kernels.compute_dtype import has_bfloat16_products
from moeq.kernels.workspace import reused
from moeq.quant.kinds import NAMED
from moeq.quant.spec import QuantizedWeight, middle

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
            frame_of(weight),
            split_planes(weight.codes_OI.mT.contiguous(), weight.bits),
            () if zero_OG is None else split_planes(zero_OG.mT.contiguous(), weight.bits),
            transposed(weight.scale_OG),
        )

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in (*self.planes, *self.zero_planes, self.scale_GO))

    def product(self, x_MI: Tensor) -> Tensor:
        """Product with the weight, [M, O]."""
        return by_weight(x_MI, self.weight(product_dtype(x_MI.dtype)))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight, [I, O], in the reused buffer: valid until the next one is made."""
        columns = len(self.planes[0])
        return make_weight(
            columns,
            self.frame.bits,
            self.scale_GO,
            joined_zero(self.zero_planes, self.frame.bits, self.scale_GO),
            dtype,
            self._codes,
        )

    def _codes(self, part: slice, out_IO: Tensor) -> None:
        join_planes([plane[part] for plane in self.planes], self.frame.bits, out_IO, second_code(out_IO))

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        code_IO = torch.empty(len(self.planes[0]), self.scale_GO.shape[1], dtype=torch.uint8)
        self._codes(slice(None), code_IO)
        zero_GO = joined_zero(self.zero_planes, self.frame.bits, self.scale_GO)
        return replace(
            self.frame,
            codes_OI=code_IO.mT.contiguous(),
            scale_OG=self.scale_GO.mT.contiguous(),
            zero_point_OG=None if zero_GO is None else zero_GO.mT.contiguous(),
        )


def transposed(scale_OG: Tensor) -> Tensor:
    """Groups first, in memory of its own: one scale a row would stay where it is, perhaps in a mapped file."""
    return scale_OG.mT.clone(memory_format=torch.contiguous_format)


def joined_zero(planes: Sequence[Tensor], bits: int, scale_GO: Tensor) -> Tensor | None:
    """Zero points of planes, uint8 in the shape of the scales; None of a symmetric grid, which has no planes."""
    if not planes:
        return None
    zero_GO = torch.empty(scale_GO.shape, dtype=torch.uint8)
    join_planes(planes, bits, zero_GO, torch.empty_like(zero_GO))
    return zero_GO


def make_weight(
    columns: int,
    bits: int,
    scale_GO: Tensor,
    zero_GO: Tensor | None,
    dtype: torch.dtype,
    codes: Callable[[slice, Tensor], None],
) -> Tensor:
    """A weight, [I, O], in the reused buffer: valid until the next one is made.

    Args:
        columns: I.
        bits: Of the codes.
        scale_GO: As stored.
        zero_GO: uint8; None for the middle of the grid.
        dtype: Of the result; any that holds the values.
        codes: Writes those of some in features, uint8 [.., O].
    """
    groups, rows = scale_GO.shape
    weight_IO, size = reused("weight", (columns, rows), dtype), columns // groups
    step = max(1, CHUNK // (rows * size))
    for first in range(0, groups, step):
        part, span = slice(first, first + step), slice(first * size, (first + step) * size)
        out_GSO = weight_IO[span].view(-1, size, rows)
        code_IO = reused("code", (out_GSO.shape[0] * size, rows), torch.uint8)
        codes(span, code_IO)
        zero_G1O = None if zero_GO is None else zero_GO[part].unsqueeze(1)
        dequantize_chunk(code_IO.view(out_GSO.shape), zero_G1O, scale_GO[part].unsqueeze(1), bits, out_GSO)
    return weight_IO


def dequantize_chunk(code: Tensor, zero: Tensor | None, scale: Tensor, bits: int, out: Tensor) -> None:
    """``(code - zero) scale``, rounded to the dtype of the scales, as ``moeq.quant.grid.dequantize_weight`` gives it.

    Levels are whole numbers of at most 8 bits, or halves, and exact in every dtype; one product of two numbers of that
    dtype is rounded once.

    Args:
        code: uint8, contiguous; overwritten.
        zero: uint8, broadcasts; None for the middle of the grid.
        scale: Broadcasts.
        bits: Of the codes.
        out: Written; any dtype that holds the values.
    """
    values = out if out.dtype == scale.dtype else reused("values", tuple(code.shape), scale.dtype)
    if bits == 1:
        values.copy_(code).sub_(middle(1))
    elif bits == 8 and zero is not None:  # differences of more than int8 holds
        values.copy_(code).sub_(zero.to(scale.dtype))
    else:
        code.sub_(2 ** (bits - 1) if zero is None else zero)
        values.copy_(code.view(torch.int8))
    values.mul_(scale)
    if values is not out:
        out.copy_(values)


def why_no_planes(grid: PackedFormat, shape: tuple[int, int]) -> str | None:
    """Why a weight cannot be planes of bits."""
    if grid.kind in NAMED:
        return f"levels of {grid.kind}"
    return f"out features not in multiples of {MULTIPLE}" if shape[0] % MULTIPLE else None


def by_weight(x_MI: Tensor, weight_IO: Tensor) -> Tensor:
    """Product, in the dtype of ``x_MI``, multiplied in that of the weight."""
    return (x_MI.to(weight_IO.dtype) @ weight_IO).to(x_MI.dtype)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies: bfloat16 is emulated slowly where it has no such products."""
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16_products() else dtype


def frame_of(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight without its tensors: what a form keeps beside its own."""
    zero = None if weight.zero_point_OG is None else _NONE
    return replace(weight, codes_OI=_NONE, scale_OG=_NONE, zero_point_OG=zero)


def second_code(code: Tensor) -> Tensor:
    """A buffer of the shape of ``code``."""
    return reused("second code", tuple(code.shape), torch.uint8)
