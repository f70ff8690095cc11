"""The form of a packed weight on a GPU: the words of its file, as ``moeq.kernels.packed_triton`` reads them.

A form takes the bytes of the file and no more, and multiplies by the numbers of the reference; sums are float32.

Shapes: M rows of the input, O out features, I in features, S rows of all experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors, unpacked_weight
from moeq.kernels.packed_products import PackedMatrix, PackedStack, grouped_product_by_torch, kernel_problem
from moeq.quant.spec import QuantizedWeight

Product = Callable[[Tensor, Tensor | None, Tensor, PackedStack, Tensor], None]
_NONE = torch.empty(0)


@dataclass(frozen=True)
class KernelForm:
    """Codes, scales and zero points in the words of the file.

    Attributes:
        frame: The weight without its tensors.
        stack: Of this weight alone.
    """

    frame: QuantizedWeight
    stack: PackedStack

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "KernelForm":
        """That of a weight for which ``why_no_kernel`` is None."""
        parts, zero_OG = packed_tensors(weight), weight.zero_point_OG
        matrix = PackedMatrix(parts["weight_packed"], parts["weight_scale"].clone(), parts.get("weight_zero_point"))
        frame = replace(weight, codes_OI=_NONE, scale_OG=_NONE, zero_point_OG=None if zero_OG is None else _NONE)
        return cls(frame, PackedStack.of([matrix], weight.bits, weight.codes_OI.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in _tensors(self.matrix))

    @property
    def matrix(self) -> PackedMatrix:
        """The weight as the kernel takes it."""
        return self.stack.matrices[0]

    def product(self, x_MI: Tensor) -> Tensor:
        """Outputs x W^T, [M, O]."""
        out_MO = x_MI.new_empty(len(x_MI), self.stack.out_features)
        product_on(x_MI.device)(x_MI.contiguous(), None, _all_rows(len(x_MI), x_MI.device), self.stack, out_MO)
        return out_MO

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given."""
        grid = PackedFormat(self.frame.bits, self.frame.group_size, self.stack.symmetric)
        parts: dict[str, Any] = {"weight_packed": self.matrix.packed_OW, "weight_scale": self.matrix.scale_OG}
        if self.matrix.zero_WG is not None:
            parts["weight_zero_point"] = self.matrix.zero_WG
        return unpacked_weight(parts, grid, (self.stack.out_features, self.stack.in_features), self.stack.dtype)


def why_no_kernel(grid: PackedFormat, shape: tuple[int, int]) -> str | None:
    """Why the kernel does not take a weight."""
    if grid.kind not in ("uniform", "full_range"):
        return f"grid {grid.kind}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return kernel_problem(grid.bits, grid.group_size or shape[1], shape[1])


def stacked(forms: Sequence[KernelForm]) -> PackedStack:
    """Weights of one shape and grid, each where it is."""
    one = forms[0].stack
    return PackedStack.of([form.matrix for form in forms], one.bits, one.in_features)


def product_on(device: torch.device) -> Product:
    """The kernel where there is a GPU, else its twin."""
    if device.type == "cpu":
        return grouped_product_by_torch
    from moeq.kernels.packed_triton import grouped_product  # triton takes seconds to import, and CPU builds lack it

    return grouped_product


@cache
def _all_rows(num_rows: int, device: torch.device) -> Tensor:
    """Bounds of one expert that all rows belong to."""
    return torch.tensor([[0, num_rows]], dtype=torch.int32, device=device)


def _tensors(matrix: PackedMatrix) -> list[Tensor]:
    return [tensor for tensor in vars(matrix).values() if tensor is not None]
