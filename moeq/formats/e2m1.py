"""Codes of grids whose levels are floats of 4 bits (e2m1), as files hold them: a sign, and a place among magnitudes."""

import torch
from torch import Tensor

from moeq.quant.spec import QuantizedWeight

_ZERO = 7  # the 8th of 15 levels


def sign_magnitudes(weight: QuantizedWeight) -> Tensor:
    """Codes of 4 bits, the highest one the sign, uint8 [O, I]; those of a group whose scale is 0 are 0."""
    place_OGS = weight.codes_OI.short().view(*weight.scale_OG.shape, -1) - _ZERO
    place_OGS = place_OGS.masked_fill((weight.scale_OG == 0).unsqueeze(2), 0)
    return torch.where(place_OGS < 0, 8 - place_OGS, place_OGS).to(torch.uint8).flatten(1)


def exponents(weight: QuantizedWeight) -> Tensor:
    """Of scales 2^k: k + 127, uint8 [O, G]; 0 where the scale is 0.

    Raises:
        ValueError: A scale is no power of two.
    """
    mantissa_OG, exponent_OG = torch.frexp(weight.scale_OG.float())
    if not bool(((mantissa_OG == 0.5) | (mantissa_OG == 0.0)).all()):
        raise ValueError("a scale is no power of two, as MXFP4 has them")
    return (exponent_OG - 1 + 127).clamp_min(0).masked_fill(mantissa_OG == 0, 0).to(torch.uint8)
