"""Digests that tell one model, tokenizer or data set from another."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BYTES_PER_TENSOR = 1 << 20


def tensor_digest(tensor: Tensor) -> str:
    """Short SHA-256 of dtype, shape and values of a tensor (all of it)."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + _bytes(tensor.detach().cpu())).hexdigest()[:16]


def model_digest(model: nn.Module, dtype_of: Callable[[str], torch.dtype] | None = None) -> str:
    """Short SHA-256 over names, dtypes, shapes and values of all parameters and persistent buffers.

    Buffers count because some change the routing (DeepSeek's ``e_score_correction_bias``).

    Of a tensor larger than 1 MiB an evenly strided sample of about 1 MiB is read, so that a large model is told apart
    in seconds; a change that touches only values between the samples is not seen.

    Args:
        model: Any model.
        dtype_of: Dtype in which floating-point tensors count, by name, where it holds them in a wider one
            (``moeq.models.storage.storage_dtype``); None is their own.
    """
    state = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        dtype = dtype_of(name) if dtype_of and parameter.is_floating_point() else parameter.dtype
        stride = max(1, parameter.numel() * dtype.itemsize // BYTES_PER_TENSOR)
        sample = parameter.detach().reshape(-1)[::stride].cpu()
        state.update(f"{name}{dtype}{tuple(parameter.shape)}".encode())
        state.update(_bytes(sample.to(dtype)))
    return state.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def digest(data: Any) -> str:
    """Short SHA-256 of a JSON-like value; keys in any order, everything else by its ``str``."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
