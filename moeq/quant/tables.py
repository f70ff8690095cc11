"""Grids whose levels stand in a table: nearest levels, values, and the scale of each group.

    real = scale * level[code],        codes from the lowest level to the highest

A scale may be negative where the table is not even.  It is searched as that of uniform groups (``moeq.quant.ranges``):
of ``STEPS`` sizes, with both signs, it is the one with the least sum |real - weight|^2.4.  Sizes are from ``WIDEST`` to
``SMALLEST`` times the one at which the largest weight lies on the outermost level: outer levels are far apart, and many
groups are better on inner ones.  Each is rounded first as it is stored.  A group of zeros has the
scale 0, as not every table has the level 0.

Scales in e4m3 keep four significant bits.  Which power of two is taken out of those of a weight is left to the file
(``common_exponent``); here they only stay within ``DEEPEST`` powers of two below that of the largest weight, so that
there is one for all of them, and for those of a few weights that a runtime merges.  A group whose weights are smaller
than that has errors of a thousandth of the largest weight.

Shapes: N groups, S in features per group; leading dots are any.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from moeq.quant.kinds import TableKind
from moeq.quant.ranges import CLIP_NORM
from moeq.quant.spec import GridSpec
from moeq.quant.two_level import divisor

STEPS, WIDEST, SMALLEST = 56, 1.5, 0.45
# Powers of two below the scale of the largest weight, and above it, that scales in e4m3 keep to.
DEEPEST, HIGHEST = 9, 2
_E4M3_LARGEST = 448.0


def nearest_codes(ratio: Tensor, table: TableKind) -> Tensor:
    """Codes of the levels that are nearest to weights in units of their scales, int64; of two alike the lower one."""
    return torch.bucketize(ratio.contiguous(), _edges(table, ratio.device))


def level_values(codes: Tensor, table: TableKind) -> Tensor:
    """Levels of codes, float32."""
    return _levels(table, codes.device)[codes.int()]


def table_scales(rows_NS: Tensor, grid: GridSpec, scale_dtype: torch.dtype, whole_N: Tensor) -> Tensor:
    """Scales [N], float32 with values that are stored, of some groups.

    Args:
        rows_NS: Their weights, float32.
        grid: With a table.
        scale_dtype: In which scales are held.
        whole_N: The largest magnitude in the whole weight of each group, float32.
    """
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
    step = (WIDEST - SMALLEST) / STEPS
    for shrink in [WIDEST - place * step for place in range(STEPS)] if grid.clip_search else [1.0]:
        size_N = stored_scales(largest_N * (shrink / outermost), table, scale_dtype, whole_N)
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


def stored_scales(scale_N: Tensor, table: TableKind, dtype: torch.dtype, whole_N: Tensor) -> Tensor:
    """Positive scales that the runtime's type and the dtype both hold, float32; 0 where there is nothing to scale.

    Args:
        scale_N: Not negative, float32.
        table: Of the levels.
        dtype: In which scales are held.
        whole_N: The largest magnitude in the whole weight of each, to which scales in e4m3 keep their distance.
    """
    limits = torch.finfo(dtype)
    ends = max(-120, math.ceil(math.log2(limits.tiny))), min(120, math.floor(math.log2(limits.max)))
    if table.scale_form == "power of two":
        stored_N = scale_N.clamp_min(torch.finfo(torch.float32).tiny).log2().round_().clamp_(*ends).exp2()
    elif table.scale_form == "e4m3":
        top_N = torch.frexp(whole_N / table.levels[-1]).exponent.float()  # the exponent above that scale
        low_N = (top_N - DEEPEST).clamp_(ends[0], ends[1]).exp2()
        high_N = (top_N + HIGHEST).clamp_(ends[0], ends[1]).exp2() * 0.9375
        mantissa_N, exponent_N = torch.frexp(scale_N)
        stored_N = torch.ldexp((mantissa_N * 16).round_(), exponent_N - 4)
        stored_N = torch.minimum(torch.maximum(stored_N, low_N), high_N)
    else:
        stored_N = scale_N.to(dtype).half().clamp_(2.0**-24, torch.finfo(torch.float16).max).float()
    return stored_N.masked_fill_(scale_N == 0, 0.0)


def common_exponent(scales: Iterable[Tensor]) -> int:
    """The least k for which scales / 2^k are at most 448, the largest number of e4m3; 0 where all are zero.

    Args:
        scales: Of weights that share a global scale, with four significant bits, of any float dtype.

    Raises:
        ValueError: Some of them are then no numbers of e4m3.
    """
    scales = [scale.float() for scale in scales]
    largest = max(float(scale.max()) for scale in scales)
    if not largest:
        return 0
    mantissa, exponent = math.frexp(largest)
    power = exponent - 9 + (mantissa * 2**9 > _E4M3_LARGEST)
    for scale in scales:
        ratio = scale * 2.0**-power
        if not torch.equal(ratio.to(torch.float8_e4m3fn).float(), ratio):
            smallest = float(scale[scale > 0].min())
            raise ValueError(
                f"scales from {smallest:.3g} to {largest:.3g} have no power of two in common that leaves floats of 8 "
                f"bits (e4m3), whose smallest is 2^-18 of their largest; put such weights on another grid"
            )
    return power


@lru_cache
def _levels(table: TableKind, device: torch.device) -> Tensor:
    return torch.tensor(table.levels, dtype=torch.float32, device=device)


@lru_cache
def _edges(table: TableKind, device: torch.device) -> Tensor:
    """Midpoints between levels."""
    levels = _levels(table, device)
    return (levels[1:] + levels[:-1]) / 2
