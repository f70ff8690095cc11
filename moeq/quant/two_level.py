"""Two-level grids as the formulas of a group see them: a real scale and a real offset, in float32, as in the runtime.

    real = scale (code - zero) - offset,      scale = d s,  offset = dmin m,  zero = 2^(bits - 1) or 0

A scale may be negative, and it may be 0: the group then has the one value -offset, whatever its codes.

Shapes: E experts, O out features, I in features, G groups per row, B super-blocks per row; leading dots are E, O.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moeq.quant.spec import SuperScales

TINY = 1e-20  # stands for a scale of 0 where it is divided by


def group_scale(scale_OG: Tensor, supers: SuperScales) -> Tensor:
    """Real scales of the groups, float32 [.., G], exact."""
    return spread(supers.scale_OB, scale_OG) * scale_OG.float()


def group_offset(min_OG: Tensor | None, supers: SuperScales) -> Tensor | None:
    """What is subtracted in each group, float32 [.., G], exact; None for a symmetric grid."""
    if min_OG is None or supers.min_OB is None:
        return None
    return spread(supers.min_OB, min_OG) * min_OG.float()


def divisor(scale_OG: Tensor) -> Tensor:
    """Scales that can be divided by."""
    return torch.where(scale_OG == 0, TINY, scale_OG)


def add_offset(weight_OI: Tensor, min_OG: Tensor | None, supers: SuperScales) -> Tensor:
    """Weights [.., I] plus the offset of their group, float32: what is to be rounded to ``scale (code - zero)``."""
    offset_OG = group_offset(min_OG, supers)
    if offset_OG is None:
        return weight_OI.float()
    return (weight_OI.float().unflatten(-1, (offset_OG.shape[-1], -1)) + offset_OG.unsqueeze(-1)).flatten(-2)


def join(parts: Sequence[SuperScales]) -> SuperScales:
    """Super-blocks of stacks of experts as one stack."""
    minima = [part.min_OB for part in parts if part.min_OB is not None]
    scale_OB = torch.cat([part.scale_OB for part in parts])
    return replace(parts[0], scale_OB=scale_OB, min_OB=torch.cat(minima) if minima else None)


def stack_supers(parts: Sequence[SuperScales]) -> SuperScales:
    """Super-blocks of single weights of one grid as a stack."""
    return join([part.each(lambda tensor: tensor.unsqueeze(0)) for part in parts])


def spread(super_OB: Tensor, of_OG: Tensor) -> Tensor:
    """Values of super-blocks for each of their groups, float32."""
    return super_OB.float().repeat_interleave(of_OG.shape[-1] // super_OB.shape[-1], -1)
