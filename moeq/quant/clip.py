"""Clipping ranges by output error: shrink the range of each group to the one that costs its output least.

    p_og = argmin_p  d_og(p) H_gg d_og(p)^T,      d_og(p) = w_og - Q_p(w_og),      range = p * (min, max)

H_gg is the diagonal block of the Hessian that belongs to group g (AWQ, arXiv 2306.00978, section 5.1 and its published
code, which clamps the weight to p * max|w| in steps of 1/20 down to 0.55).  p = 1 comes first, so that the sum over
groups of this error is never above that of min-max ranges.  What the groups of a row do to each other is left out.

Where inputs are correlated or uneven, this differs from the 2.4-norm search of ``grid.py``, which uses no data.

On a full-range grid the ranges of the symmetric one are tried with both signs of the scale.

Shapes: E experts, O out features, I in features, G groups per row, S in features per group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moeq.quant.grid import QParams
from moeq.quant.ranges import full_range_scales, qparams_of_range, scales_of_signs
from moeq.quant.spec import GridSpec, middle

STEPS, SMALLEST = 20, 0.5


def clip_by_output_error(weight_EOI: Tensor, hessian_EII: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> QParams:
    """Scale and zero point of every group with the least output error of that group.

    Args:
        weight_EOI: Finite weights, any float dtype.
        hessian_EII: Symmetric, any positive scale; float32.  Groups without input keep their min-max range.
        grid: Bits, groups, symmetry; its ``clip_search`` is not asked.
        scale_dtype: Storage dtype of the scales, in which every candidate is judged.

    Raises:
        ValueError: The group size does not divide the in features.
    """
    groups = grid.num_groups(weight_EOI.shape[-1])
    scales, zero_points = [], []
    for weight_OI, hessian_II in zip(weight_EOI, hessian_EII, strict=True):
        rows_GOS = weight_OI.float().unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
        blocks_GSS = hessian_II.view(groups, rows_GOS.shape[2], groups, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        scale_GO, zero_GO = _search(rows_GOS, blocks_GSS.contiguous(), grid, scale_dtype)
        scales.append(scale_GO.T)
        zero_points.append(zero_GO.T)
    scale_EOG = torch.stack(scales).to(scale_dtype)
    return QParams(scale_EOG, None if grid.symmetric else torch.stack(zero_points).to(torch.uint8))


def _search(rows_GOS: Tensor, blocks_GSS: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Best scale and zero point [G, O] over all shrink steps, and both signs of a full-range grid."""
    if grid.bits == 1:
        return _of_signs(rows_GOS, blocks_GSS, scale_dtype)
    low_GO, high_GO = rows_GOS.amin(2).clamp_(max=0.0), rows_GOS.amax(2).clamp_(min=0.0)
    best_GO, found = torch.full_like(low_GO, torch.inf), (low_GO, high_GO)
    for scale_GO, zero_GO in _candidates(low_GO, high_GO, grid, scale_dtype):
        error_GO = _group_error(rows_GOS, blocks_GSS, scale_GO, zero_GO, grid.bits)
        better_GO = error_GO < best_GO
        best_GO = torch.where(better_GO, error_GO, best_GO)
        found = torch.where(better_GO, scale_GO, found[0]), torch.where(better_GO, zero_GO, found[1])
    return found


def _of_signs(rows_GOS: Tensor, blocks_GSS: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point [G, O] of one bit, whose codes are signs whatever the scale: least squares."""
    level_GOS = torch.where(rows_GOS > 0, 0.5, -0.5)
    push_GOS = torch.bmm(level_GOS, blocks_GSS)
    wanted_GO = (push_GOS * rows_GOS).sum(2) / (push_GOS * level_GOS).sum(2)
    scale_GO = torch.where(wanted_GO > 0, wanted_GO, 2.0 * rows_GOS.abs().mean(2))  # also without input: 0 / 0
    scale_GO = scales_of_signs(scale_GO, scale_dtype)
    return scale_GO, torch.full_like(scale_GO, middle(1))


def _candidates(
    low_GO: Tensor, high_GO: Tensor, grid: GridSpec, scale_dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points: min-max first, then narrower ranges."""
    if grid.kind == "full_range":
        scale_GO = full_range_scales(low_GO, high_GO, grid.bits, scale_dtype)
        yield scale_GO, torch.full_like(scale_GO, float(2 ** (grid.bits - 1)))
    for step in range(STEPS + 1):
        shrink = 1.0 - step * (1.0 - SMALLEST) / STEPS
        scale_GO, zero_GO = qparams_of_range(shrink * low_GO, shrink * high_GO, grid, scale_dtype)
        yield scale_GO, zero_GO
        if grid.kind == "full_range":
            yield -scale_GO, zero_GO


def _group_error(rows_GOS: Tensor, blocks_GSS: Tensor, scale_GO: Tensor, zero_GO: Tensor, bits: int) -> Tensor:
    """``d H_gg d^T`` of every group of every row, [G, O]."""
    scale_GO1, zero_GO1 = scale_GO.unsqueeze(2), zero_GO.unsqueeze(2)
    delta_GOS = (rows_GOS / scale_GO1).round_().add_(zero_GO1).clamp_(0, 2**bits - 1).sub_(zero_GO1)
    delta_GOS.mul_(scale_GO1).sub_(rows_GOS)
    return torch.bmm(delta_GOS, blocks_GSS).mul_(delta_GOS).sum(2)
