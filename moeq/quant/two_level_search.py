"""Choosing the two-level scales of K-quants, before any weight is rounded.

The error of a super-block is sum_i h_i (real_i - weight_i)^2 over its 256 weights, h the importance of their in
features (the diagonal of the Hessian; 1 without data) times sqrt(mean square + weight^2): large weights count more.

1. Every group alone: ranges of several widths, on the codes of each the least-squares scale and offset; the best.
2. These are committed as d s and dmin m: d such that the weighted squares of what s does not hold are least.
3. Descent on the error itself, codes rounded anew each time: d and dmin by least squares on the codes, then s and m of
   each group by one up or down.  Nothing is taken that is not better, so no step is worse than the one before.

1 and 2 are what llama.cpp's quantizer does, and with which it ends (``make_qkx3_quants``, ``make_qx_quants``,
``make_qp_quants``); here every d that is judged is a float16 already.

Shapes: E experts, O out features, I in features, N super-blocks, G groups of a super-block, S weights of a group.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from moeq.quant.kinds import TwoLevelKind
from moeq.quant.spec import GridSpec, SuperScales
from moeq.quant.two_level import divisor

WIDTHS = 24  # ranges that are tried in a group
ROUNDS = 3
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24  # weights that are searched at once, as for uniform groups
SMALLEST = 2.0**-24  # positive float16


@dataclass(frozen=True)
class _Blocks:
    """Weights and importances of some super-blocks, float32 [N, G, S]."""

    weight: Tensor
    importance: Tensor
    kind: TwoLevelKind

    @property
    def zero(self) -> int:
        return 2 ** (self.kind.bits - 1) if self.kind.symmetric else 0


@dataclass(frozen=True)
class _Scales:
    """Scales of some super-blocks, float32 with the values that are stored; minima are 0 on symmetric grids."""

    super_scale_N1: Tensor
    super_min_N1: Tensor
    scale_NG: Tensor
    min_NG: Tensor


def choose_two_level(
    weight_EOI: Tensor, grid: GridSpec, dtype: torch.dtype, importance_EI: Tensor | None, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor | None, SuperScales]:
    """Integer scales, integer minima and what they are multiples of: int8 [E, O, G], int8 or None, [E, O, B].

    Args:
        weight_EOI: Finite weights, any float dtype.
        grid: Two-level; without its clip search ranges are min-max and nothing descends.
        dtype: Of the weights that the codes stand for.
        importance_EI: How much the error of an in feature counts, not negative; None is all alike.
        rounds: Of the descent; 0 ends where llama.cpp does.
    """
    kind = grid.two_level
    assert kind is not None
    num_experts, out_features, in_features = weight_EOI.shape
    rows = max(1, (CPU_CHUNK if weight_EOI.device.type == "cpu" else GPU_CHUNK) // in_features)
    found = []
    for expert in range(num_experts):
        importance_I = torch.ones(in_features, device=weight_EOI.device)
        if importance_EI is not None:
            importance_I = _relative(importance_EI[expert].float())
        for part_OI in weight_EOI[expert].float().split(rows):
            weight_NGS = part_OI.reshape(-1, kind.num_groups, kind.group_size)
            importance_NGS = importance_I.expand_as(part_OI).reshape(weight_NGS.shape)
            found.append(_choose(weight_NGS, importance_NGS, kind, rounds if grid.clip_search else -1))
    shape = (num_experts, out_features, -1)
    scale = torch.cat([part.scale_NG for part in found]).to(torch.int8).view(shape)
    super_scale = torch.cat([part.super_scale_N1 for part in found]).half().view(shape)
    if kind.symmetric:
        return scale, None, SuperScales(grid.stored_kind, super_scale, None, dtype)
    minimum = torch.cat([part.min_NG for part in found]).to(torch.int8).view(shape)
    super_min = torch.cat([part.super_min_N1 for part in found]).half().view(shape)
    return scale, minimum, SuperScales(grid.stored_kind, super_scale, super_min, dtype)


def _relative(importance_I: Tensor) -> Tensor:
    """Importances with the mean 1, none of them 0: an input that was dead in calibration may live in use."""
    mean = importance_I.mean()
    return torch.where(mean > 0, importance_I / mean, 1.0).clamp_min(1e-4)


def _choose(weight_NGS: Tensor, importance_NGS: Tensor, kind: TwoLevelKind, rounds: int) -> _Scales:
    """Scales of some super-blocks; no rounds are ranges of every width and no descent, -1 is the one range min-max."""
    spread_N11 = weight_NGS.square().mean((1, 2), keepdim=True)
    blocks = _Blocks(weight_NGS, importance_NGS * (spread_N11 + weight_NGS.square()).sqrt(), kind)
    scale_NG, offset_NG = _fit_groups(blocks, 0 if rounds < 0 else WIDTHS)
    total_NG = blocks.importance.sum(2)
    super_scale_N1, int_scale_NG = _commit(scale_NG, total_NG, kind.lowest_scale, kind.highest_scale)
    super_min_N1, int_min_NG = _commit(offset_NG, total_NG, 0, kind.highest_scale)
    scales = _Scales(super_scale_N1, super_min_N1, int_scale_NG, int_min_NG)
    for _ in range(rounds):
        scales = _descend(blocks, scales)
    return scales


def _fit_groups(blocks: _Blocks, widths: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, G] of every group alone: the range from end to end, or the best of several widths."""
    x, w, top = blocks.weight, blocks.importance, 2**blocks.kind.bits - 1
    if blocks.kind.symmetric:
        extreme = x.gather(2, x.abs().argmax(2, keepdim=True))  # gets the lowest level, the one without a counterpart
        start, unit = torch.zeros_like(extreme), extreme / -blocks.zero
    else:
        start = x.amin(2, keepdim=True).clamp_max(0.0)
        unit = (x.amax(2, keepdim=True) - start) / top
    unit = torch.where(unit == 0, SMALLEST, unit)

    def levels(shrink: float) -> Tensor:
        return ((x - start) / (unit * shrink)).round_().add_(blocks.zero).clamp_(0, top).sub_(blocks.zero)

    error = (w * (levels(1.0) * unit + start - x).square()).sum(2)
    best = error, unit.squeeze(2), -start.squeeze(2)
    for step in range(widths):
        level = levels(1.1 - 0.6 * step / widths)
        error, scale, low = _least_squares(blocks, level)
        better = error < best[0]
        tried = error, scale, -low
        best = (
            torch.where(better, tried[0], best[0]),
            torch.where(better, tried[1], best[1]),
            torch.where(better, tried[2], best[2]),
        )
    return best[1], best[2]


def _least_squares(blocks: _Blocks, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error, scale and lowest value (0 on symmetric grids, never above 0) of groups on given levels, [N, G]."""
    x, w = blocks.weight, blocks.importance
    weighted = w * level
    sum_w, sum_x, sum_xx = w.sum(2), (w * x).sum(2), (w * x * x).sum(2)
    sum_l, sum_ll, sum_xl = weighted.sum(2), (weighted * level).sum(2), (weighted * x).sum(2)
    tiny = torch.finfo(torch.float32).tiny
    scale, low = sum_xl / sum_ll.clamp_min(tiny), torch.zeros_like(sum_x)
    if not blocks.kind.symmetric:
        determinant = (sum_w * sum_ll - sum_l * sum_l).clamp_min(tiny)
        low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        scale = torch.where(low > 0, scale, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        low = low.clamp_max(0.0)
    error = sum_xx - 2 * (scale * sum_xl + low * sum_x) + scale * scale * sum_ll
    return error + 2 * scale * low * sum_l + low * low * sum_w, scale, low


def _commit(value_NG: Tensor, weight_NG: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """A float16 [N, 1] and integers [N, G] whose products are nearest to values, in weighted squares."""
    largest = value_NG.gather(1, value_NG.abs().argmax(1, keepdim=True))
    end = lowest if lowest < 0 else highest
    best_N1 = torch.full_like(largest, torch.inf)
    super_N1, whole_NG = torch.zeros_like(largest), torch.zeros_like(value_NG)
    for step in range(-8, 9):
        first = (value_NG / _float16(largest / (end * (1 + 0.01 * step)))).round_().clamp_(lowest, highest)
        square = (weight_NG * first * first).sum(1, keepdim=True).clamp_min(1e-30)
        factor = _float16((weight_NG * first * value_NG).sum(1, keepdim=True) / square)
        whole = (value_NG / factor).round_().clamp_(lowest, highest)
        error = (weight_NG * (value_NG - factor * whole).square()).sum(1, keepdim=True)
        better = error < best_N1
        best_N1, super_N1 = torch.where(better, error, best_N1), torch.where(better, factor, super_N1)
        whole_NG = torch.where(better, whole, whole_NG)
    return super_N1, whole_NG


def _descend(blocks: _Blocks, scales: _Scales) -> _Scales:
    """One round: d and dmin by least squares on the codes, then s and m by one up or down."""
    moved = _move_supers(blocks, scales)
    better = _errors(blocks, moved).sum(1, keepdim=True) < _errors(blocks, scales).sum(1, keepdim=True)
    scales = replace(
        scales,
        super_scale_N1=torch.where(better, moved.super_scale_N1, scales.super_scale_N1),
        super_min_N1=torch.where(better, moved.super_min_N1, scales.super_min_N1),
    )
    kind, best = blocks.kind, _errors(blocks, scales)
    scale_NG, min_NG = scales.scale_NG, scales.min_NG
    for up, more in product((-1, 0, 1), (0,) if kind.symmetric else (-1, 0, 1)):
        tried = replace(
            scales,
            scale_NG=(scales.scale_NG + up).clamp_(kind.lowest_scale, kind.highest_scale),
            min_NG=(scales.min_NG + more).clamp_(0, kind.highest_scale),
        )
        error = _errors(blocks, tried)
        better = error < best
        best = torch.where(better, error, best)
        scale_NG, min_NG = torch.where(better, tried.scale_NG, scale_NG), torch.where(better, tried.min_NG, min_NG)
    return replace(scales, scale_NG=scale_NG, min_NG=min_NG)


def _move_supers(blocks: _Blocks, scales: _Scales) -> _Scales:
    """Both d and dmin by least squares on the present codes and integers; where dmin would not be positive, neither."""
    x, w, level = blocks.weight, blocks.importance, _rounded(blocks, scales)[0]
    a = level * scales.scale_NG.unsqueeze(2)
    aa, ax = (w * a * a).sum((1, 2)), (w * a * x).sum((1, 2))
    if blocks.kind.symmetric:
        return replace(scales, super_scale_N1=_float16(ax / aa.clamp_min(1e-30)).unsqueeze(1))
    b = -scales.min_NG.unsqueeze(2).expand_as(x)
    ab, bb, bx = (w * a * b).sum((1, 2)), (w * b * b).sum((1, 2)), (w * b * x).sum((1, 2))
    determinant = aa * bb - ab * ab
    safe = torch.where(determinant > 1e-6 * aa * bb, determinant, torch.inf)  # else nothing moves
    new_scale, new_min = (bb * ax - ab * bx) / safe, (aa * bx - ab * ax) / safe
    usable = (new_min > 0) & safe.isfinite()
    return replace(
        scales,
        super_scale_N1=torch.where(usable.unsqueeze(1), _float16(new_scale).unsqueeze(1), scales.super_scale_N1),
        super_min_N1=torch.where(usable.unsqueeze(1), _float16(new_min).unsqueeze(1), scales.super_min_N1),
    )


def _rounded(blocks: _Blocks, scales: _Scales) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest levels, [N, G, S], real scales, [N, G, 1], and weights plus their offsets."""
    real = (scales.super_scale_N1 * scales.scale_NG).unsqueeze(2)
    shifted = blocks.weight + (scales.super_min_N1 * scales.min_NG).unsqueeze(2)
    top = 2**blocks.kind.bits - 1 - blocks.zero
    return (shifted / divisor(real)).round_().clamp_(-blocks.zero, top), real, shifted


def _errors(blocks: _Blocks, scales: _Scales) -> Tensor:
    """Error of each group on given scales, [N, G]."""
    level, real, shifted = _rounded(blocks, scales)
    return level.mul_(real).sub_(shifted).square_().mul_(blocks.importance).sum(2)


def _float16(value: Tensor) -> Tensor:
    """Rounded to what is stored; not to 0."""
    rounded = value.half().float()
    return torch.where(rounded == 0, SMALLEST, rounded)
