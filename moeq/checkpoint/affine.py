"""What formats of quantized weights have in common: numbers of few bits, scales, and where each scale applies.

A weight is ``(number - zero) * scale`` in float32, rounded once to the dtype of the model.

Legend: O out, I in, R rows of scales, G groups of in-features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeq.disk.pickled import PickledTensor
from moeq.disk.tensor_file import StoredTensor

# Weights that are dequantized at once, in float32.
CHUNK = 1 << 22
Part = StoredTensor | PickledTensor


class Readable(Protocol):
    """A tensor that a source has, not read yet."""

    @property
    def name(self) -> str:
        """Its key."""

    @property
    def path(self) -> Path:
        """The file that it is in, or the first part of it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def num_bytes(self) -> int:
        """Of its values."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors of files that it is made of."""

    def read(self) -> Tensor:
        """Its values, in memory of its own."""


@dataclass(frozen=True)
class Dequantized:
    """A weight that files hold quantized, under the key that it has in a checkpoint that is not.

    Attributes:
        name: Key of the weight.
        dtype: Of the values.
        shape: Of the weight.
        parts: Tensors of the files that it is made of.
        make: Reads these and computes the values.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    make: Callable[[], Tensor]

    @property
    def path(self) -> Path:
        """The file of its first part."""
        return self.parts[0].path

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values, computed anew.

        Raises:
            ValueError: A file ends before a part of it.
        """
        return self.make()


def parts_of(*tensors: Readable | None) -> tuple[Part, ...]:
    """The tensors of files behind those that are there."""
    return tuple(part for tensor in tensors if tensor is not None for part in tensor.parts)


def dequantize(
    values_OI: Tensor, scale_RG: Tensor, zero_RG: Tensor | None, row_O: Tensor, group_I: Tensor, dtype: torch.dtype
) -> Tensor:
    """Weights of numbers and scales, [O, I].

    Args:
        values_OI: Numbers of few bits in any dtype.
        scale_RG: Scales.
        zero_RG: What stands for zero; None is 0.
        row_O: int64, row of the scales of each out-feature.
        group_I: int64, column of the scales of each in-feature.
        dtype: Of the weights.
    """
    num_rows, num_columns = values_OI.shape
    weight_OI = torch.empty(num_rows, num_columns, dtype=dtype)
    scale_RG = scale_RG.float()
    step = max(1, CHUNK // max(1, num_columns))
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        rows = values_OI[part].float()
        if zero_RG is not None:
            rows -= zero_RG[row_O[part]].float()[:, group_I]
        weight_OI[part] = rows.mul_(scale_RG[row_O[part]][:, group_I])
    return weight_OI


def grid_of(
    name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Which row and column of its scales applies to each row and column of a matrix.

    Args:
        name: Of the weight, for messages.
        shape: [O, I].
        scale_shape: [R, G].
        block: Rows and columns of a block, of which the last may be cut; None where blocks are all whole.

    Raises:
        ValueError: The scales do not cover the matrix.
    """
    index = []
    for axis, (length, count) in enumerate(zip(shape, scale_shape, strict=True)):
        size = block[axis] if block and -(-length // block[axis]) == count else length // max(1, count)
        if not size or -(-length // size) != count:
            raise ValueError(f"{name} has {list(scale_shape)} scales for {list(shape)} weights; copy the source again")
        index.append(torch.arange(length) // size)
    return index[0], index[1]


def as_matrix(scale: Tensor) -> Tensor:
    """Scales as [R, G]: one number, and one per row, are matrices of one column."""
    return scale.reshape(-1, 1) if scale.ndim < 2 else scale


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape that ``as_matrix`` gives."""
    return (math.prod(shape), 1) if len(shape) < 2 else (shape[-2], shape[-1])
