"""Adam for leaves of which an expert's rows may get no gradient in a step: such rows do not move, nor do their moments.

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,    x <- x - rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

with t the number of steps in which the row had tokens.  Every step that a row makes is of the size of the rate,
however few of the batch's tokens chose its expert: what Adam divides by is the row's own gradient.

Shapes: E rows (experts of a stack, or 1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BETAS, EPSILON = (0.9, 0.95), 1e-12  # gradients are means over tokens, so they are small


@dataclass(frozen=True)
class Moments:
    """Of one leaf: running means of gradients and of their squares, and steps made, float32 [E]."""

    first: Tensor
    second: Tensor
    steps_E: Tensor


def no_moments(value: Tensor) -> Moments:
    """Before the first step."""
    steps_E = torch.zeros(len(value), device=value.device)
    return Moments(torch.zeros_like(value), torch.zeros_like(value), steps_E)


@torch.no_grad()
def adam_step(value: Tensor, gradient: Tensor, moments: Moments, rate: float, active_E: Tensor | None = None) -> None:
    """One step, in place.

    Args:
        value: What learns, [E, ...].
        gradient: At it.
        moments: Of it; they are changed.
        rate: Step size.
        active_E: bool; rows that had tokens.  None is all.
    """
    if active_E is not None and not bool(active_E.all()):
        rows = active_E.nonzero().squeeze(1)
        some = Moments(moments.first[rows], moments.second[rows], moments.steps_E[rows])
        part = value[rows]
        adam_step(part, gradient[rows], some, rate)
        for whole, changed in ((value, part), (moments.first, some.first), (moments.second, some.second)):
            whole[rows] = changed
        moments.steps_E[rows] = some.steps_E
        return
    moments.steps_E.add_(1)
    moments.first.lerp_(gradient, 1 - BETAS[0])
    moments.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    like_rows = (-1, *[1] * (value.ndim - 1))
    scale_E = rate / (1 - BETAS[0] ** moments.steps_E)
    root_E = (1 - BETAS[1] ** moments.steps_E).rsqrt()
    length = moments.second.sqrt().mul_(root_E.view(like_rows)).add_(EPSILON)
    value.sub_(moments.first.div(length).mul_(scale_E.view(like_rows)))
