"""Round to nearest (RTN): every weight takes the closest level of its group's grid, with no calibration data.

The baseline of every table, and what an expert gets that cannot be calibrated.

Shapes: E experts, O out features, I in features, G groups per row.
"""

import torch
from torch import Tensor

from moeq.quant.grid import QParams, choose_qparams, quantize, real_values
from moeq.quant.solution import Solution, output_energy, relative_error
from moeq.quant.spec import GridSpec


def round_to_nearest(
    weight_EOI: Tensor,
    grid: GridSpec,
    scale_dtype: torch.dtype,
    hessian_EII: Tensor | None = None,
    qparams: QParams | None = None,
) -> Solution:
    """Quantize each expert to nearest; one expert at a time, so that the workspace is that of one weight.

    Args:
        weight_EOI: Finite weights, any float dtype.
        grid: The integer grid.
        scale_dtype: Storage dtype of the scales.
        hessian_EII: Norm in which the relative error is reported; None is the identity.  The codes do not depend on it.
        qparams: Scales and zero points that were chosen before; None chooses them from the weight alone.

    Raises:
        ValueError: The group size does not divide the in features.
    """
    qparams = qparams or choose_qparams(weight_EOI, grid, scale_dtype)
    codes_EOI = torch.empty(weight_EOI.shape, dtype=torch.uint8, device=weight_EOI.device)
    error_E = torch.zeros(len(weight_EOI), dtype=torch.float64, device=weight_EOI.device)
    energy_E = torch.zeros_like(error_E)
    for expert_idx, weight_OI in enumerate(weight_EOI):
        expert = qparams.experts(slice(expert_idx, expert_idx + 1))
        weight_1OI = weight_OI.float().unsqueeze(0)
        codes_1OI = quantize(weight_1OI, expert, grid)
        codes_EOI[expert_idx] = codes_1OI[0]
        delta_OI = (weight_1OI - real_values(codes_1OI, expert, grid))[0]
        if hessian_EII is None:
            error_E[expert_idx] = delta_OI.square().sum(dtype=torch.float64)
            energy_E[expert_idx] = weight_1OI.square().sum(dtype=torch.float64)
        else:
            error_E[expert_idx] = output_energy(delta_OI, hessian_EII[expert_idx])
            energy_E[expert_idx] = output_energy(weight_1OI[0], hessian_EII[expert_idx])
    return Solution(
        codes_EOI=codes_EOI,
        scale_EOG=qparams.scale_EOG,
        zero_point_EOG=qparams.zero_point_EOG,
        relative_error_E=relative_error(error_E, energy_E),
        num_retries_E=torch.zeros(len(weight_EOI), dtype=torch.int64, device=weight_EOI.device),
        failed_E=torch.zeros(len(weight_EOI), dtype=torch.bool, device=weight_EOI.device),
        super_scales=qparams.super_scales,
    )
