"""NVFP4 in GGUF: blocks of four groups of 16, and beside each tensor one float32 per weight that multiplies it.

    "x.weight"  64 of scale[i / 16] level[code[i]]: four scales in e4m3, then codes      "x.scale"  global scales

llama.cpp multiplies the product with a tensor by its "scale" where it has one, a number or one for each expert; but in
some families only: in others it reads the scales and leaves them out, or stops at a tensor that it does not know.
Sources: ggml-common.h (``block_nvfp4``), llama-model.cpp and llama-graph.cpp of llama.cpp (``wq_s`` and its like).
"""

import torch
from torch import Tensor

from moeq.formats.e2m1 import sign_magnitudes
from moeq.quant.spec import QuantizedWeight
from moeq.quant.tables import common_exponent

GROUPS = 4  # of a block
# Families in which llama.cpp was seen to multiply by the scales (tests/formats/test_gguf_nvfp4.py).
SCALED = frozenset({"cohere2_moe", "hy_v3", "mellum", "mixtral", "qwen3_moe"})


def check_scaled(family: str, name: str) -> None:
    """Raise ValueError where llama.cpp would not multiply by the global scales of a tensor of the file."""
    if family not in SCALED or not name.startswith("blk."):
        raise ValueError(
            f"gguf: {name} of {family} in NVFP4: llama.cpp was seen to multiply by its global scale in blocks of "
            f"{', '.join(sorted(SCALED))} alone; choose grid mxfp4 or iq4_nl"
        )


def scale_name(name: str) -> str:
    """Name of the tensor of global scales of a tensor."""
    return f"{name.removesuffix('.weight')}.scale"


def global_scale(weight: QuantizedWeight) -> float:
    """A power of two that leaves numbers of e4m3 of the scales."""
    return float(2.0 ** common_exponent([weight.scale_OG]))


def nvfp4_blocks(weight: QuantizedWeight) -> Tensor:
    """Bytes of a weight, uint8 [O, I / 64 * 36].

    Raises:
        ValueError: Its scales have no power of two in common.
    """
    rows = len(weight.codes_OI)
    octet_OG = (weight.scale_OG.float() / global_scale(weight)).to(torch.float8_e4m3fn).view(torch.uint8)
    low, high = sign_magnitudes(weight).view(rows, -1, 2, 8).unbind(2)
    codes_OBN = (low | high << 4).view(rows, -1, 8 * GROUPS)
    return torch.cat([octet_OG.view(rows, -1, GROUPS), codes_OBN], 2).flatten(1)
