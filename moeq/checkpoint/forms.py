"""Forms of packed weights that a processor multiplies fast, and which one a weight gets.

The reference (``moeq.checkpoint.packed``) makes a whole weight anew at every call, by the formula of the fit.  A form
holds the same codes, scales and zero points arranged for a processor, multiplies by them, and gives them back as they
were, so that a prepared model writes the checkpoint that it was read from.  For each type of device ``CHOICE`` says how
the form of a weight is made, and ``GROUPED`` how the products of many experts are.  What has no form stays with the
reference, which says why.

Shapes: M rows of the input, O out features, I in features, S rows of all experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeq.checkpoint.gpu_forms import KernelForm, why_no_kernel
from moeq.checkpoint.nibble_forms import NibbleForm, SqueezedForm, nibble_bytes, why_no_nibbles
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.plane_form import PlaneForm, why_no_planes
from moeq.quant.spec import QuantizedWeight


class Form(Protocol):
    """A weight [O, I] as a processor takes it."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def product(self, x_MI: Tensor) -> Tensor:
        """Product with the weight, [M, O], in the dtype of ``x_MI``; without gradients."""

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given, to the bit."""


@dataclass(frozen=True)
class Packed:
    """What a form is chosen by: a packed weight, the dtype of activations, whether it may take more than its file."""

    grid: PackedFormat
    shape: tuple[int, int]
    weight_dtype: torch.dtype
    dtype: torch.dtype
    room: bool


Maker = Callable[[QuantizedWeight], Form]
Choose = Callable[[Packed], "Maker | str"]
Grouped = Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor, Sequence[int]], Tensor]


def choose_on_cpu(packed: Packed) -> Maker | str:
    """How a form is made on a CPU, or why there is none.

    The operation on codes of 4 bits where it takes the weight, with room as it reads it, else squeezed; all others as
    planes of bits.
    """
    if why_no_nibbles(packed.grid, packed.shape, packed.weight_dtype, packed.dtype) is None:
        return NibbleForm.of if packed.room else SqueezedForm.of
    reason = why_no_planes(packed.grid, packed.shape)
    return PlaneForm.of if reason is None else reason


def choose_on_gpu(packed: Packed) -> Maker | str:
    """How a form is made on a GPU, or why there is none."""
    reason = why_no_kernel(packed.grid, packed.shape)
    return KernelForm.of if reason is None else reason


def one_after_another(products: Sequence[Callable[[Tensor], Tensor]], x_SI: Tensor, counts: Sequence[int]) -> Tensor:
    """Products of the rows of some experts with one part of each, [S, O].

    Args:
        products: With the part of each expert: prepared, packed or plain linears, or gate and up together.
        x_SI: Rows in the order of the experts.
        counts: Rows of each expert, at least one.
    """
    parts = [product(x_MI) for product, x_MI in zip(products, x_SI.split(list(counts)), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# By type of device.
CHOICE: dict[str, Choose] = {"cpu": choose_on_cpu, "cuda": choose_on_gpu}
GROUPED: dict[str, Grouped] = {"cpu": one_after_another, "cuda": one_after_another}


def extra_bytes(packed: Packed) -> int | None:
    """Bytes beyond those of the file that a form takes which has room; None where room makes no difference."""
    if why_no_nibbles(packed.grid, packed.shape, packed.weight_dtype, packed.dtype) is not None:
        return None
    return nibble_bytes(packed.grid, packed.shape) - file_bytes(packed.grid, packed.shape, packed.weight_dtype)


def file_bytes(grid: PackedFormat, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of codes, scales and zero points."""
    rows, columns = shape
    return rows * (columns * grid.bits + grid.spec.overhead_bits(columns, 8 * dtype.itemsize)) // 8
