"""Scales of groups, once more, for the codes that a solve has chosen.

Before the solve a scale can only be chosen for the weights of its group alone; once the codes are known, the output
error is a quadratic function of it.  With the rest of a row fixed, adding a to the scale of a group adds a L to the row
(L the levels of its codes), and to tr(D H D^T)

    a^2 L H_gg L^T - 2 a L (D H)_g^T,        D = W - real,

which each group in turn makes least, over scales as they are stored.  Every step lowers the error or leaves everything
as it was; codes and signs stay.  O I^2 operations per round, a fraction of the solve.

Shapes: E experts, O out features, I in features, G groups per row, S weights of a group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moeq.quant.grid import QParams, real_values
from moeq.quant.spec import GridSpec
from moeq.quant.tables import stored_scales

ROUNDS = 2


def refit_scales(
    weight_EOI: Tensor, hessian_EII: Tensor, codes_EOI: Tensor, qparams: QParams, grid: GridSpec
) -> tuple[QParams, Tensor]:
    """The parameters with better scales, and tr(D H D^T) of each expert on them, float64.

    Args:
        weight_EOI: What was solved, float32.
        hessian_EII: Symmetric and positive semidefinite, float32.
        codes_EOI: What the solve chose.
        qparams: Of a grid with one level of scales.
        grid: That grid.
    """
    scale_EOG, dtype = qparams.scale_EOG.float().clone(), qparams.scale_EOG.dtype
    ones = replace(qparams, scale_EOG=torch.ones_like(scale_EOG))
    levels_EOI = real_values(codes_EOI, ones, grid)
    size = levels_EOI.shape[2] // scale_EOG.shape[2]
    delta_EOI = weight_EOI - real_values(codes_EOI, qparams, grid)
    slope_EOI = delta_EOI @ hessian_EII
    whole_E1 = weight_EOI.abs().amax((1, 2)).unsqueeze(1)
    for _ in range(ROUNDS):
        for group in range(scale_EOG.shape[2]):
            part = slice(group * size, (group + 1) * size)
            level_EOS, old_EO = levels_EOI[..., part], scale_EOG[..., group]
            square_EO = ((level_EOS @ hessian_EII[:, part, part]) * level_EOS).sum(2)
            slope_EO = (slope_EOI[..., part] * level_EOS).sum(2)
            wanted_EO = old_EO + slope_EO / square_EO.clamp_min(torch.finfo(torch.float32).tiny)
            new_EO = old_EO.sign() * _stored((wanted_EO * old_EO.sign()).clamp_min(0.0), grid, dtype, whole_E1)
            change_EO = new_EO - old_EO
            better_EO = change_EO.square() * square_EO < 2 * change_EO * slope_EO
            change_EO = torch.where(better_EO & (new_EO != 0), change_EO, 0.0)
            scale_EOG[..., group] += change_EO
            step_EOS = change_EO.unsqueeze(2) * level_EOS
            delta_EOI[..., part] -= step_EOS
            slope_EOI -= step_EOS @ hessian_EII[:, part]
    error_E = (delta_EOI * slope_EOI).sum((1, 2), dtype=torch.float64)
    return replace(qparams, scale_EOG=scale_EOG.to(dtype)), error_E


def _stored(scale_EO: Tensor, grid: GridSpec, dtype: torch.dtype, whole_E1: Tensor) -> Tensor:
    """Positive scales as they are stored, float32; 0 where they would vanish."""
    if grid.table is not None:
        return stored_scales(scale_EO, grid.table, dtype, whole_E1)
    limits = torch.finfo(dtype)
    return torch.where(scale_EO < limits.tiny, 0.0, scale_EO.clamp(max=limits.max).to(dtype).float())
