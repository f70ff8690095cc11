"""Weights of random codes and scales, for timing: nothing is quantized.

Scales are those of weights with a standard deviation of 0.02, so that activations keep their size through the blocks.
"""

import torch

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.quant.kinds import SUPER_BLOCK
from moeq.quant.spec import QuantizedWeight, SuperScales

DEVIATION = 0.02


def drawn_weight(rows: int, columns: int, grid: PackedFormat) -> QuantizedWeight:
    """Random codes and scales, in bfloat16; of uniform groups or two levels of scales."""
    codes_OI = torch.randint(0, 2**grid.bits, (rows, columns), dtype=torch.uint8)
    step = DEVIATION * 12**0.5 / 2**grid.bits
    if (two_level := grid.spec.two_level) is not None:
        groups, highest = columns // two_level.group_size, two_level.highest_scale
        # Integer scales of the upper half of their range, and minima that move the middle of the codes to about 0.
        scale_OG, min_OG = torch.randint(highest // 2, highest + 1, (2, rows, groups)).to(torch.int8).unbind(0)
        d_OB = torch.full((rows, columns // SUPER_BLOCK), step / (0.75 * highest), dtype=torch.float16)
        dmin_OB = None if grid.symmetric else d_OB * (2 ** (grid.bits - 1) - 0.5)
        supers = SuperScales(grid.kind, d_OB, dmin_OB, torch.bfloat16)
        zero_OG = None if grid.symmetric else min_OG
        return QuantizedWeight(codes_OI, scale_OG, zero_OG, grid.bits, grid.group_size, supers)
    groups, middle = columns // (grid.group_size or columns), 2 ** (grid.bits - 1)
    scale_OG = (0.9 + 0.2 * torch.rand(rows, groups)) * step
    zero_OG = None if grid.symmetric else torch.randint(max(0, middle - 2), middle + 2, (rows, groups)).to(torch.uint8)
    return QuantizedWeight(codes_OI, scale_OG.bfloat16(), zero_OG, grid.bits, grid.group_size)
