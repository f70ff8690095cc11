"""Grids whose levels stand in a table: nearest levels, values, and the scale of each group.

    real = scale * level[code],        codes from the lowest level to the highest

A scale may be negative where the table is not even.  It is searched as that of uniform groups (``moeq.quant.ranges``):
of ``STEPS`` sizes, downward from the one at which the largest weight lies on the outermost level, with both signs, it
is the one with the least sum |real - weight|^2.4.  Each is rounded first as it is stored.  A group of zeros has the
scale 0, as not every table has the level 0.

Shapes: N groups, S in features per group; leading dots are any.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from moeq.quant.kinds import TableKind
from moeq.quant.ranges import CLIP_NORM
from moeq.quant.spec import GridSpec
from moeq.quant.two_level import divisor

STEPS, SMALLEST = 56, 0.45


def nearest_codes(ratio: Tensor, table: TableKind) -> Tensor:
    """Codes of the levels that are nearest to weights in units of their scales, int64; of two alike the lower one."""
    return torch.bucketize(ratio.contiguous(), _edges(table, ratio.device))


def level_values(codes: Tensor, table: TableKind) -> Tensor:
    """Levels of codes, float32."""
    return _levels(table, codes.device)[codes.int()]


def table_scales(rows_NS: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> Tensor:
    """Scales [N], float32 with values that are stored, of some groups (float32 [N, S])."""
    table = grid.table
    assert table is not None
    low_N, high_N = rows_NS.amin(1), rows_NS.amax(1)
    largest_N = torch.maximum(-low_N, high_N)
    outermost, is_even = max(map(abs, table.levels)), table.levels[0] == -table.levels[-1]
    # The largest weight lies where the table reaches farthest.
    side = 1.0 if table.levels[-1] == outermost else -1.0
    first_N = torch.ones_like(low_N) if is_even else torch.where(high_N > -low_N, side, -side)
    signs = [first_N] if is_even or not grid.clip_search else [first_N, -first_N]
    best_N, found_N = torch.full_like(largest_N, torch.inf), torch.zeros_like(largest_N)
    for step in range(STEPS if grid.clip_search else 1):
        shrink = 1.0 - step * (1.0 - SMALLEST) / STEPS
        size_N = stored_scales(largest_N * (shrink / outermost), table, scale_dtype)
        for sign_N in signs:
            error_N = _error(rows_NS, size_N * sign_N, largest_N, table)
            better_N = error_N < best_N
            best_N = torch.where(better_N, error_N, best_N)
            found_N = torch.where(better_N, size_N * sign_N, found_N)
    return found_N


def _error(rows_NS: Tensor, scale_N: Tensor, largest_N: Tensor, table: TableKind) -> Tensor:
    """Sum over each group of |real - weight|^2.4, in units of its largest weight^2.4; [N]."""
    ratio_NS = rows_NS / divisor(scale_N).unsqueeze(1)
    error_NS = level_values(nearest_codes(ratio_NS, table), table).sub_(ratio_NS).abs_()
    unit_N = scale_N.abs() / largest_N.clamp_min(torch.finfo(torch.float32).tiny)
    return error_NS.mul_(unit_N.unsqueeze(1)).pow_(CLIP_NORM).sum(1)


def stored_scales(scale_N: Tensor, table: TableKind, dtype: torch.dtype) -> Tensor:
    """Positive scales that the runtime's type and the dtype both hold, float32; 0 where there is nothing to scale."""
    if table.power_of_two:
        limits = torch.finfo(dtype)
        ends = max(-120, math.ceil(math.log2(limits.tiny))), min(120, math.floor(math.log2(limits.max)))
        stored_N = scale_N.clamp_min(torch.finfo(torch.float32).tiny).log2().round_().clamp_(*ends).exp2()
    else:
        stored_N = scale_N.to(dtype).half().clamp_(2.0**-24, torch.finfo(torch.float16).max).float()
    return stored_N.masked_fill_(scale_N == 0, 0.0)


@lru_cache
def _levels(table: TableKind, device: torch.device) -> Tensor:
    return torch.tensor(table.levels, dtype=torch.float32, device=device)


@lru_cache
def _edges(table: TableKind, device: torch.device) -> Tensor:
    """Midpoints between levels."""
    levels = _levels(table, device)
    return (levels[1:] + levels[:-1]) / 2
