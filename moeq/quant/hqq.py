"""HQQ: ranges that ignore the few weights that fit badly, without data.

Half-quadratic quantization (Badri and Shaji, 2023) minimises, per group, the p-norm of the rounding error with p < 1,
which outliers hardly move:

    min_s,z |W - s (Q - z)|_p^p,      Q = clamp(round(W / s) + z, 0, 2^bits - 1)

by half-quadratic splitting with an auxiliary error W_e: alternate, with beta growing from step to step,

    W_e = shrink(W - s (Q - z)),      shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    s, z = least squares of W - W_e on the codes Q

Two things differ from the published code.  It keeps s and moves a real-valued z, z = mean(Q - (W - W_e) / s); zero
points are stored as integers here, in which that step would be lost, so s moves (in closed form) and z follows,
rounded.  And it returns the last iterate, or the one before the summed error first rose; here each group keeps the best
of its own iterates, the start included, with s rounded to the dtype it is stored in before it is judged.

Shapes: E experts, O out features, I in features, G groups per row, S in features per group.
"""

import torch
from torch import Tensor

from moeq.quant.grid import QParams, choose_qparams
from moeq.quant.spec import GridSpec

STEPS, BETA, BETA_GROWTH = 20, 10.0, 1.01  # of the published code


def half_quadratic(weight_EOI: Tensor, grid: GridSpec, scale_dtype: torch.dtype, norm: float = 0.7) -> QParams:
    """Scale and zero point of every group; one expert at a time.

    Args:
        weight_EOI: Finite weights, any float dtype.
        grid: The integer grid; its clip search, where it is on, chooses the ranges to start from.
        scale_dtype: Storage dtype of the scales.
        norm: p, above 0 and at most 1.

    Raises:
        ValueError: The norm is out of range, the grid is two-level, or the group size does not divide the in features.
    """
    if not 0.0 < norm <= 1.0:
        raise ValueError(f"norm ({norm}) must be above 0 and at most 1; the usual value is 0.7")
    if grid.is_named or grid.bits == 1:
        raise ValueError(f"HQQ moves whole zero points, which {grid.label} lacks; choose RTN or GPTQ for it")
    start = choose_qparams(weight_EOI, grid, scale_dtype)
    solved = [
        _solve(weight_EOI[e].float().view(*start.scale_EOG.shape[1:], -1), start.experts(slice(e, e + 1)), grid, norm)
        for e in range(len(weight_EOI))
    ]
    scale_EOG = torch.stack([scale_OG for scale_OG, _ in solved]).to(scale_dtype)
    return QParams(scale_EOG, None if grid.symmetric else torch.stack([z for _, z in solved]).to(torch.uint8))


def _solve(weight_OGS: Tensor, start: QParams, grid: GridSpec, norm: float) -> tuple[Tensor, Tensor]:
    """Best scale and zero point [O, G] over the iterates."""
    limits, top = torch.finfo(start.scale_EOG.dtype), 2**grid.bits - 1
    scale_OG1 = start.scale_EOG[0].float().unsqueeze(-1)
    middle = torch.full_like(scale_OG1, float(2 ** (grid.bits - 1)))
    zero_OG1 = middle if start.zero_point_EOG is None else start.zero_point_EOG[0].float().unsqueeze(-1)
    # beta is made for weights of unit size; the published code applies it to weights of any.
    unit_OG1 = weight_OGS.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best_OG1, best = torch.full_like(scale_OG1, torch.inf), (scale_OG1, zero_OG1)
    for step in range(STEPS + 1):
        codes_OGS = (weight_OGS / scale_OG1).round_().add_(zero_OG1).clamp_(0, top)
        levels_OGS = codes_OGS - zero_OG1
        error_OGS = (weight_OGS - levels_OGS * scale_OG1) / unit_OG1
        error_OG1 = error_OGS.abs().pow_(norm).sum(-1, keepdim=True)
        better_OG1 = error_OG1 < best_OG1
        best_OG1 = torch.where(better_OG1, error_OG1, best_OG1)
        best = torch.where(better_OG1, scale_OG1, best[0]), torch.where(better_OG1, zero_OG1, best[1])
        target_OGS = weight_OGS - unit_OG1 * shrink(error_OGS, BETA * BETA_GROWTH**step, norm)
        fitted_OG1 = _refit(target_OGS, levels_OGS, scale_OG1)
        fitted_OG1 = fitted_OG1.sign() * fitted_OG1.abs().clamp(limits.tiny, limits.max)
        scale_OG1 = fitted_OG1.to(start.scale_EOG.dtype).float()
        if not grid.symmetric:
            zero_OG1 = (codes_OGS - target_OGS / scale_OG1).mean(-1, keepdim=True).round_().clamp_(0, top)
    return best[0].squeeze(-1), best[1].squeeze(-1)


def shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of the p-norm, ``sign(x) max(0, |x| - |x|^(p-1) / beta)``; 0 where x is 0."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(torch.finfo(error.dtype).tiny).pow(norm - 1.0) / beta).clamp_min_(0.0)


def _refit(target_OGS: Tensor, levels_OGS: Tensor, scale_OG1: Tensor) -> Tensor:
    """Least-squares scale of ``target ~ scale * levels``; the old one without levels, or where it would turn."""
    square_OG1 = levels_OGS.square().sum(-1, keepdim=True)
    fitted_OG1 = (target_OGS * levels_OGS).sum(-1, keepdim=True) / square_OG1.clamp_min(1.0)
    return torch.where((square_OG1 > 0) & (fitted_OG1 * scale_OG1.sign() > 0), fitted_OG1, scale_OG1)
