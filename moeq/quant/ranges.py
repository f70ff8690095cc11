"""Scales of uniform groups: the range from end to end, or the one that costs least in the 2.4-norm.

The clip search (GPTQ's published code: norm 2.4, steps of 1/100, down to a fifth) takes, per group, the range
p * (min, max), p = 1, 0.99, ..., 0.21, with the least sum |real - weight|^2.4; p = 1 is the first candidate, so the
result is never worse than min-max.  Every candidate scale is rounded to the dtype it is stored in before it is judged.
A group leaves the search once what the candidate's ends cut off its weights costs more than its best candidate in all:
later candidates cut off more.  By Hoelder's inequality, cutting off x costs sum x^2.4 >= (sum x^2)^1.4 / (sum x)^0.4.

On a full-range grid the range from end to end comes first, the largest weight on the lowest level; then every candidate
of the symmetric grid with this sign, and with the other one.  The scales of one sign are those of the other for the
negated weights.

One bit has no range to search: least squares are at twice the mean magnitude of the group.  No level of it is 0, so
that a group of zeros has the scale 0.

Shapes: N groups, S in features per group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moeq.quant.spec import GridSpec, middle

CLIP_NORM = 2.4
CLIP_STEPS = 80
CLIP_STEP = 0.01
CLIP_CHECK = 16  # candidates between two looks at which groups are done


def scales_of_groups(rows_NS: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N], float32 with values of their storage dtypes, of some groups (float32 [N, S])."""
    if grid.bits == 1:
        return scales_of_signs(2.0 * rows_NS.abs().mean(1), scale_dtype), rows_NS.new_full((len(rows_NS),), middle(1))
    low_N, high_N = rows_NS.amin(1).clamp_(max=0.0), rows_NS.amax(1).clamp_(min=0.0)  # aminmax is 10 x slower
    if grid.kind == "full_range":
        return _of_either_sign(rows_NS, low_N, high_N, grid, scale_dtype)
    scale_N, zero_N = qparams_of_range(low_N, high_N, grid, scale_dtype)
    if not grid.clip_search:
        return scale_N, zero_N
    start_3N = torch.stack([torch.full_like(scale_N, torch.inf), scale_N, zero_N])
    found_3N = _search(rows_NS, low_N, high_N, grid, scale_dtype, start_3N)
    return found_3N[1], found_3N[2]


def full_range_scales(low_N: Tensor, high_N: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales that give code 0 to the end of largest magnitude of ``[low, high]``, rounded to their storage dtype."""
    scale_N = stored_scale(torch.maximum(-low_N, high_N) / 2 ** (bits - 1), dtype)
    return torch.where(high_N > -low_N, -scale_N, scale_N)


def stored_scale(scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales as they are stored, in float32: normal numbers; 1 where there is nothing to scale."""
    limits = torch.finfo(dtype)
    return scale_N.clamp(limits.tiny, limits.max).to(dtype).float().masked_fill_(scale_N == 0, 1.0)


def scales_of_signs(scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of one bit as they are stored, in float32; 0 stays 0."""
    return torch.where(scale_N == 0, 0.0, stored_scale(scale_N, dtype))


def _of_either_sign(
    rows_NS: Tensor, low_N: Tensor, high_N: Tensor, grid: GridSpec, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale, of either sign, and zero point [N] of a full-range grid."""
    scale_N = full_range_scales(low_N, high_N, grid.bits, scale_dtype)
    zero_N = torch.full_like(scale_N, float(2 ** (grid.bits - 1)))
    if not grid.clip_search:
        return scale_N, zero_N
    even, work = replace(grid, kind="uniform"), (torch.empty_like(rows_NS), torch.empty_like(rows_NS))
    minmax_N = qparams_of_range(low_N, high_N, even, scale_dtype)[0]
    error_N = _relative_error(rows_NS, scale_N, zero_N, minmax_N, grid.bits, work)
    best_3N = torch.stack([error_N, scale_N, zero_N])
    for sign_N in (scale_N.sign(), -scale_N.sign()):
        turned_NS = rows_NS * sign_N.unsqueeze(1)
        ends = torch.where(sign_N > 0, low_N, -high_N), torch.where(sign_N > 0, high_N, -low_N)
        found_3N = _search(turned_NS, *ends, even, scale_dtype, best_3N.clone())
        found_3N[1] *= sign_N
        best_3N = torch.where(found_3N[0] < best_3N[0], found_3N, best_3N)
    return best_3N[1], zero_N


def _search(
    rows_NS: Tensor, low_N: Tensor, high_N: Tensor, grid: GridSpec, scale_dtype: torch.dtype, found_3N: Tensor
) -> Tensor:
    """Error in min-max's scale^2.4, scale and zero point [3, N]: the best of all steps, or what was found before."""
    minmax_N = qparams_of_range(low_N, high_N, grid, scale_dtype)[0]
    ends = _widest_ends(low_N, high_N, minmax_N, grid, torch.finfo(scale_dtype).tiny)
    best_3N, index_N = found_3N, torch.arange(len(rows_NS), device=rows_NS.device)
    fixed_5N = torch.stack([low_N, high_N, minmax_N, *ends])
    work = (torch.empty_like(rows_NS), torch.empty_like(rows_NS))
    for step in range(CLIP_STEPS):
        shrink = 1.0 - step * CLIP_STEP
        if step and step % CLIP_CHECK == 0:
            (kept_N,) = torch.where(_cut_off(rows_NS, shrink, fixed_5N, work[0]) < best_3N[0])
            if len(kept_N) < 0.9 * len(index_N):
                found_3N[:, index_N] = best_3N
                rows_NS, index_N = rows_NS[kept_N], index_N[kept_N]
                fixed_5N, best_3N = fixed_5N[:, kept_N], best_3N[:, kept_N]
                work = (work[0][: len(kept_N)], work[1][: len(kept_N)])
            if len(kept_N) == 0:
                break
        low_N, high_N, minmax_N = fixed_5N[:3]
        candidate_N, candidate_zero_N = qparams_of_range(shrink * low_N, shrink * high_N, grid, scale_dtype)
        error_N = _relative_error(rows_NS, candidate_N, candidate_zero_N, minmax_N, grid.bits, work)
        tried_3N = torch.stack([error_N, candidate_N, candidate_zero_N])
        best_3N = torch.where(error_N < best_3N[0], tried_3N, best_3N)
    found_3N[:, index_N] = best_3N
    return found_3N


def _widest_ends(low_N: Tensor, high_N: Tensor, scale_N: Tensor, grid: GridSpec, tiny: float) -> tuple[Tensor, Tensor]:
    """Middle and half width, in scales of min-max, of an interval of which p parts hold the levels of p.

    Apart from the range itself that is half a level, for the rounding of the zero point, the spare level of a symmetric
    grid, and 1% of the range for the rounding of the scale.  Everything where a scale may have to be raised.
    """
    low_N, high_N = low_N / scale_N, high_N / scale_N
    if grid.symmetric:
        largest_N = torch.maximum(-low_N, high_N)
        low_N, high_N = -largest_N * (2 ** (grid.bits - 1) / (2 ** (grid.bits - 1) - 1)), largest_N
    slack_N = 0.51 + 0.01 * (high_N - low_N)
    reach_N = (0.5 * (high_N - low_N) + slack_N).masked_fill_(scale_N < 10.0 * tiny, 1e30)
    return 0.5 * (high_N + low_N), reach_N


def _cut_off(rows_NS: Tensor, shrink: float, fixed_5N: Tensor, work_NS: Tensor) -> Tensor:
    """A lower bound of a group's error for this candidate and all later ones, in min-max's scale^2.4; [N]."""
    _, _, scale_N, middle_N, reach_N = fixed_5N
    torch.div(rows_NS, scale_N.unsqueeze(1), out=work_NS)
    work_NS.sub_(shrink * middle_N.unsqueeze(1)).abs_().sub_(shrink * reach_N.unsqueeze(1)).clamp_min_(0.0)
    square_N, sum_N = torch.linalg.vector_norm(work_NS, dim=1).square_(), work_NS.sum(1)
    bound_N = square_N.pow_(CLIP_NORM - 1) / sum_N.clamp_min_(torch.finfo(torch.float32).tiny).pow_(CLIP_NORM - 2)
    return bound_N.mul_(0.999)  # for the rounding of float32


def qparams_of_range(low_N: Tensor, high_N: Tensor, grid: GridSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point that represent ``[low, high]`` (low <= 0 <= high), rounded to their storage dtypes."""
    top = 2**grid.bits - 1
    if grid.symmetric:
        scale_N = torch.maximum(-low_N, high_N) / (2 ** (grid.bits - 1) - 1)
    else:
        scale_N = high_N / top - low_N / top  # not (high - low) / top, which can overflow
    scale_N = stored_scale(scale_N, dtype)
    if grid.symmetric:
        return scale_N, torch.full_like(scale_N, float(2 ** (grid.bits - 1)))
    return scale_N, (-low_N / scale_N).round_().clamp_(0, top)


def _relative_error(
    rows_NS: Tensor, scale_N: Tensor, zero_N: Tensor, minmax_N: Tensor, bits: int, work: tuple[Tensor, Tensor]
) -> Tensor:
    """Sum over each group of |real - weight|^2.4, in units of min-max's scale^2.4; [N]."""
    error_N = _clip_error(rows_NS, scale_N, zero_N, bits, work)
    # The error is in units of the candidate scale; a ratio of scales keeps tiny weights out of the subnormals.
    ratio_N = (scale_N / minmax_N).abs_().double()  # float32's power depends on the position
    return error_N.mul_(ratio_N.pow_(CLIP_NORM).float())


def _clip_error(rows_NS: Tensor, scale_N: Tensor, zero_N: Tensor, bits: int, work: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over each group of |real - weight|^2.4, in units of scale^2.4; [N].  ``work`` are two buffers [N, S]."""
    exact, error = work
    zero_N1 = zero_N.unsqueeze(1)
    torch.div(rows_NS, scale_N.unsqueeze(1), out=exact)
    # Clamped between two constants after the zero point is added: clamp is ten times slower between two tensors.
    torch.round(exact, out=error).add_(zero_N1).clamp_(0, 2**bits - 1).sub_(exact.add_(zero_N1))
    # (error^2)^1.2 by way of log2: half the time of pow; log2(0) = -inf gives 0.
    return torch.mul(error, error, out=error).log2_().mul_(CLIP_NORM / 2).exp2_().sum(dim=1)
