"""Memory that products of packed weights use again and again: one buffer for each purpose, dtype, device and thread."""

import threading
from math import prod

import torch
from torch import Tensor

_held = threading.local()


def reused(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A contiguous tensor of any content, whose memory the next call for the same purpose gets, too.

    It grows to the largest that was asked for, and stays.
    """
    buffers: dict[tuple[str, torch.dtype, str], Tensor] = _held.__dict__.setdefault("buffers", {})
    key, num = (purpose, dtype, str(device)), prod(shape)
    held = buffers.get(key)
    if held is None or held.numel() < num:
        buffers[key] = held = torch.empty(num, dtype=dtype, device=device)
    return held[:num].view(shape)
