"""Weights that are numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def check_finite_weights(module: nn.Module, prefix: str = "") -> None:
    """Raise ValueError naming the first floating-point parameter that holds a NaN or an infinity.

    Args:
        module: The model, or a part of it.
        prefix: Path of the part, with a dot at its end.
    """
    check_finite_tensors((f"{prefix}{name}", parameter) for name, parameter in module.named_parameters())


def check_finite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError naming the first floating-point tensor that holds a NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{name} has {count} of {tensor.numel()} values that are NaN or infinite; "
                "the checkpoint is damaged, download it again"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Without a temporary of its size: extremes are NaN where any value is."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor.detach()))
