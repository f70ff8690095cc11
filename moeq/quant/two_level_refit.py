"""Integer scales and minima of a two-level grid, once more, for the codes that a solve has chosen.

Before the solve they can only be chosen for each weight alone; once the codes are known, the output error is a
quadratic function of them.  With the rest of a row fixed, changing the scale of a group by a and its minimum by b
changes the row by a d L - b dmin 1 on the group (L its levels), and tr(D H D^T) by

    a^2 d^2 L H_gg L^T - 2 a b d dmin L H_gg 1^T + b^2 dmin^2 1 H_gg 1^T - 2 (a d L - b dmin 1) (D H)_g^T

with D = W - real, of which each group in turn takes the least over whole a and b within one of 0.  Every step lowers
the error or leaves everything as it was; codes, d and dmin stay.  O I^2 operations per round, a fraction of the solve.

Shapes: E experts, O out features, I in features, G groups per row, S weights of a group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moeq.quant.grid import QParams, real_values
from moeq.quant.spec import GridSpec
from moeq.quant.two_level import spread

ROUNDS = 2


def refit_integers(
    weight_EOI: Tensor, hessian_EII: Tensor, codes_EOI: Tensor, qparams: QParams, grid: GridSpec
) -> tuple[QParams, Tensor]:
    """The parameters with better integers, and tr(D H D^T) of each expert on them, float64.

    Args:
        weight_EOI: What was solved, float32.
        hessian_EII: Symmetric and positive semidefinite, float32.
        codes_EOI: What the solve chose.
        qparams: Of a two-level grid.
        grid: That grid.
    """
    kind, supers = grid.two_level, qparams.super_scales
    assert kind is not None
    assert supers is not None
    zero = 2 ** (kind.bits - 1) if kind.symmetric else 0
    size, levels_EOI = kind.group_size, codes_EOI.float() - zero
    scale_EOG, unit_EOG = qparams.scale_EOG.float(), spread(supers.scale_OB, qparams.scale_EOG)
    min_EOG = min_unit_EOG = torch.zeros_like(scale_EOG)
    if qparams.zero_point_EOG is not None and supers.min_OB is not None:
        min_EOG, min_unit_EOG = qparams.zero_point_EOG.float(), spread(supers.min_OB, scale_EOG)
    delta_EOI = weight_EOI - real_values(codes_EOI, qparams, grid)
    slope_EOI = delta_EOI @ hessian_EII
    for _ in range(ROUNDS):
        for group in range(scale_EOG.shape[2]):
            part = slice(group * size, (group + 1) * size)
            column_EOS = levels_EOI[..., part] * unit_EOG[..., group, None]
            down_EO = min_unit_EOG[..., group]
            block_ESS, slope_EOS = hessian_EII[:, part, part], slope_EOI[..., part]
            change = _best_change(
                column_EOS, down_EO, block_ESS, slope_EOS, scale_EOG[..., group], min_EOG[..., group], grid
            )
            scale_EOG[..., group] += change[0]
            min_EOG[..., group] += change[1]
            step_EOS = change[0].unsqueeze(2) * column_EOS - (change[1] * down_EO).unsqueeze(2)
            delta_EOI[..., part] -= step_EOS
            slope_EOI -= step_EOS @ hessian_EII[:, part]
    error_E = (delta_EOI * slope_EOI).sum((1, 2), dtype=torch.float64)
    minimum = None if qparams.zero_point_EOG is None else min_EOG.to(torch.int8)
    return replace(qparams, scale_EOG=scale_EOG.to(torch.int8), zero_point_EOG=minimum), error_E


def _best_change(
    column_EOS: Tensor, down_EO: Tensor, block_ESS: Tensor, slope_EOS: Tensor, scale_EO: Tensor, min_EO: Tensor,
    grid: GridSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Whole numbers to add to the scale and minimum of a group, [E, O] each; 0 where nothing is better."""
    kind = grid.two_level
    assert kind is not None
    product_EOS = column_EOS @ block_ESS
    aa, ab = (product_EOS * column_EOS).sum(2), -product_EOS.sum(2) * down_EO
    bb = block_ESS.sum((1, 2)).unsqueeze(1) * down_EO.square()
    a_slope, b_slope = (slope_EOS * column_EOS).sum(2), -slope_EOS.sum(2) * down_EO
    best, a, b = torch.zeros_like(aa), torch.zeros_like(aa), torch.zeros_like(aa)
    for move in (0,) if kind.symmetric else (0, -1, 1):
        to_min = (min_EO + move).clamp(0, kind.highest_scale) - min_EO
        wanted = ((a_slope - to_min * ab) / aa.clamp_min(1e-30)).round().clamp(-1, 1)
        to_scale = (scale_EO + wanted).clamp(kind.lowest_scale, kind.highest_scale) - scale_EO
        gain = to_scale.square() * aa + 2 * to_scale * to_min * ab + to_min.square() * bb
        gain -= 2 * (to_scale * a_slope + to_min * b_slope)
        better = gain < best
        best = torch.where(better, gain, best)
        a, b = torch.where(better, to_scale, a), torch.where(better, to_min, b)
    return a, b
