"""Weights of GPTQ's layout read in numpy, after its description: shares nothing with what writes them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def dequantize_words(parts: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Tensor:
    """Values of a quantized weight.

    Args:
        parts: ``qweight`` [W, O], ``qzeros`` [G, V], ``scales`` [G, O], ``g_idx`` [I].
        config: ``quantization_config`` of the folder.
        name: Of the module, which ``dynamic`` may give another width.

    Returns:
        float32, [O, I].

    Raises:
        ValueError: The configuration says that the module is not quantized, or ``g_idx`` names groups that are not
            there.
    """
    bits = settings_of(config, name)["bits"]
    codes_OI = _unpacked(parts["qweight"].numpy().T, bits)
    # Numbers wrap around: a stored zero point of 2^bits - 1 is zero where one was taken off.
    zero_GO = _unpacked(parts["qzeros"].numpy(), bits) + (config["checkpoint_format"] == "gptq")
    zero_GO %= 2**bits
    group_I = parts["g_idx"].numpy()
    if not (group_I.min() >= 0 and group_I.max() < len(zero_GO)):
        raise ValueError(f"g_idx of {name} names groups beyond its {len(zero_GO)}; export again")
    scale_GO = parts["scales"].numpy().astype(np.float32)
    real_OI = (codes_OI - zero_GO[group_I].T).astype(np.float32) * scale_GO[group_I].T
    return torch.from_numpy(real_OI)


def settings_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Bits and group size of a module: those of the first rule of ``dynamic`` that matches, or of the whole.

    Raises:
        ValueError: The rule says that the module is not quantized.
    """
    for rule, values in (config["dynamic"] or {}).items():
        if re.match(rule[2:], name):
            if rule.startswith("-:"):
                raise ValueError(f"{name} is quantized, but the configuration says that it is not; export again")
            return {**config, **values}
    return dict(config)


def _unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of rows of words, the lowest bit of each first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    streams = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return streams.astype(np.int64) @ (1 << np.arange(bits))
