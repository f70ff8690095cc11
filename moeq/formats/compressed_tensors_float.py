"""NVFP4 and MXFP4 in compressed-tensors, weights alone: two codes a byte, and scales of 8 bits.

    NVFP4   weight = level * weight_scale / weight_global_scale,    weight_scale in e4m3
    MXFP4   weight = level * 2^(weight_scale - 127)

The first of two codes is in the low bits.  vLLM reads one global scale for linears that it merges (q, k, v; the gate
and up projection of an expert): they get one, a power of two, which changes no value.  Sources: compressed-tensors 0.20
(compressors/nvfp4, compressors/mxfp4), vLLM (compressed_tensors_w4a4_nvfp4.py and its like).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeq.disk.tensor_file import Declared
from moeq.formats.e2m1 import exponents, sign_magnitudes
from moeq.quant.carrier import Carrier
from moeq.quant.kinds import TABLES
from moeq.quant.spec import QuantizedWeight
from moeq.quant.tables import common_exponent

LAYOUTS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


def arguments(carrier: Carrier) -> dict[str, Any]:
    """What compressed-tensors calls the arguments of a weight."""
    is_nvfp4 = carrier.kind == "nvfp4"
    return {
        "num_bits": carrier.bits,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if is_nvfp4 else "group",
        "group_size": carrier.group_size,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn" if is_nvfp4 else "torch.uint8",
    }


def declared_tensors(key: str, shape: tuple[int, int], carrier: Carrier) -> dict[str, Declared]:
    """Tensors of a weight [O, I] by key, before there are any."""
    (rows, columns), size = shape, TABLES[carrier.kind].group_size
    is_nvfp4 = carrier.kind == "nvfp4"
    scale = Declared(torch.float8_e4m3fn if is_nvfp4 else torch.uint8, (rows, columns // size))
    found = {f"{key}.weight_packed": Declared(torch.uint8, (rows, columns // 2)), f"{key}.weight_scale": scale}
    return found | ({f"{key}.weight_global_scale": Declared(torch.float32, (1,))} if is_nvfp4 else {})


def float_tensors(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Tensors of weights of one kind that a runtime merges, by key.

    Raises:
        ValueError: Their scales have no global scale in common; it names the first.
    """
    found: dict[str, Tensor] = {}
    if any(weight.kind == "nvfp4" for weight in weights.values()):
        try:
            power = common_exponent([weight.scale_OG for weight in weights.values()])
        except ValueError as error:
            raise ValueError(f"{next(iter(weights))}: {error}") from error
    for key, weight in weights.items():
        code_OI = sign_magnitudes(weight)
        found[f"{key}.weight_packed"] = code_OI[:, ::2] | code_OI[:, 1::2] << 4
        if weight.kind == "mxfp4":
            found[f"{key}.weight_scale"] = exponents(weight)
            continue
        found[f"{key}.weight_scale"] = (weight.scale_OG.float() * 2.0**-power).to(torch.float8_e4m3fn)
        found[f"{key}.weight_global_scale"] = torch.tensor([2.0**-power])
    return found
