"""Linear changes of parameters (scales, rotations along one axis), gathered first and applied at once in float64.

A parameter may be scaled, rotated and rotated per head; the product is rounded once.

Legend: H heads, R rows of a head.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from moeq.quant.hadamard import Basis

AxisMap = Callable[[Tensor], Tensor]


class Steps:
    """What is to be done to which parameter, by name."""

    def __init__(self) -> None:
        self.by_name: defaultdict[str, list[AxisMap]] = defaultdict(list)

    def scale(self, name: str, axis: int, factor_D: Tensor) -> None:
        """Multiply along an axis (negative, counted from the end)."""
        self._along(name, axis, lambda x: x * factor_D.to(x.device, x.dtype))

    def turn(self, name: str, axis: int, basis: Basis) -> None:
        """Rotate along an axis."""
        self._along(name, axis, basis)

    def turn_heads(self, name: str, axis: int, num_heads: int, size: int, basis: Basis) -> None:
        """Rotate the last ``size`` entries of each of ``num_heads`` equal parts of an axis."""

        def step(x: Tensor) -> Tensor:
            heads_HR = x.unflatten(-1, (num_heads, -1))
            kept = heads_HR.shape[-1] - size
            return torch.cat([heads_HR[..., :kept], basis(heads_HR[..., kept:])], -1).flatten(-2)

        self._along(name, axis, step)

    def value(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter after its steps, float32; a stack of experts is worked on one expert at a time."""
        if parameter.ndim > 2:
            return torch.stack([self.value(name, part) for part in parameter])
        x = parameter.detach().double()
        for step in self.by_name.get(name, []):
            x = step(x)
        return x.float()

    def _along(self, name: str, axis: int, step: AxisMap) -> None:
        self.by_name[name].append(lambda x: step(x.movedim(axis, -1)).movedim(-1, axis))
