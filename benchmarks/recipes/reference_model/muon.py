"""Muon (momentum, orthogonalised by Newton-Schulz) for weight matrices and stacks of them, AdamW for the rest.

``torch.optim.Muon`` takes matrices only; the experts of a transformers v5 model are 3-D stacks, which is why this
file exists.  Both parts live in one optimizer so that Lightning's automatic optimization and checkpoints apply.
Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def orthogonalize(momentum: Tensor, dtype: torch.dtype, num_steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of each [..., O, I] matrix, by a quintic Newton-Schulz iteration in ``dtype``."""
    x = momentum.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(momentum.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with ``num_splits`` > 0 are stepped by Muon (their rows split in that many equal matrices:
    2 for a fused gate and up), the others by AdamW.  Every group has its own ``lr`` and ``weight_decay``; Muon's
    products are in ``product_dtype``.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], product_dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "num_splits": 0})
        # Not of the groups, which a checkpoint brings along: another processor may continue in another dtype.
        self.product_dtype = product_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = partial(_muon_update, dtype=self.product_dtype) if group["num_splits"] else _adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update(parameter.grad, self.state[parameter], group) * group["lr"])
        return loss


def _muon_update(gradient: Tensor, state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    momentum = state.setdefault("momentum", torch.zeros_like(gradient))
    momentum.lerp_(gradient, 0.05)
    matrices = gradient.lerp(momentum, 0.95).unflatten(-2, (group["num_splits"], -1))
    rows, columns = matrices.shape[-2:]
    return orthogonalize(matrices, dtype).mul_(max(1.0, rows / columns) ** 0.5).flatten(-3, -2)


def _adamw_update(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not state:
        state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
    state["step"] += 1
    state["mean"].lerp_(gradient, 0.1)
    state["square"].lerp_(gradient.square(), 0.05)
    mean = state["mean"] / (1 - 0.9 ** state["step"])
    square = state["square"] / (1 - 0.95 ** state["step"])
    return mean / (square.sqrt() + 1e-8)
