"""Choosing the two-level scales of K-quants, before any weight is rounded.

The error of a super-block is sum_i h_i (real_i - weight_i)^2 over its 256 weights, h the importance of their in
features (the diagonal of the Hessian; 1 without data) times sqrt(mean square + weight^2): large weights count more.

1. Every group alone: ranges of several widths, on the codes of each the least-squares scale and offset, the best of all.
2. These are committed as d s and dmin m: d such that the weighted squares of what s does not hold are least.
3. Descent on the error itself, codes rounded anew each time: d and dmin by least squares on the codes, then s and m of
   each group by one up or down.  Nothing is taken that is not better, so no step is worse than the one before.

1 and 2 are what llama.cpp's quantizer does (``make_qkx3_quants``, ``make_qx_quants``, ``make_qp_quants``), with which it
ends; here every d that is judged is a float16 already.

Shapes: E experts, O out features, I in features, N super-blocks, G groups of a super-block, S weights of a group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.quant.kinds import SUPER_BLOCK, TwoLevelKind
from moeq.quant.spec import GridSpec, SuperScales

WIDTHS = 24  # ranges that are tried in a group
ROUNDS = 3
CHUNK = 1 << 16  # weights that are searched at once: what stays in a core's cache
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
    rows = max(1, CHUNK // in_features) if weight_EOI.device.type == "cpu" else out_features
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
        return scale, None, SuperScales(grid.kind, super_scale, None, dtype)
    minimum = torch.cat([part.min_NG for part in found]).to(torch.int8).view(shape)
    super_min = torch.cat([part.super_min_N1 for part in found]).half().view(shape)
    return scale, minimum, SuperScales(grid.kind, super_scale, super_min, dtype)


def _relative(importance_I: Tensor) -> Tensor:
    """Importances with the mean 1, none of them 0: an input that was dead in calibration may live in use."""
    mean = importance_I.mean()
    return torch.where(mean > 0, importance_I / mean, 1.0).clamp_min(1e-4)


def _choose(weight_NGS: Tensor, importance_NGS: Tensor, kind: TwoLevelKind, rounds: int) -> _Scales:
    """Scales of some super-blocks; no rounds are ranges of every width and no descent, -1 is the one range min-max."""
    spread_N11 = weight_NGS.square().mean((1, 2), keepdim=True)
    blocks = _Blocks(weight_NGS, importance_NGS * (spread_N11 + weight_NGS.square()).sqrt(), kind)
    scale_NG, offset_NG = _fit_groups(blocks, 1 if rounds < 0 else WIDTHS)
    total_NG = blocks.importance.sum(2)
    super_scale_N1, int_scale_NG = _commit(scale_NG, total_NG, kind.lowest_scale, kind.highest_scale)
    super_min_N1, int_min_NG = _commit(offset_NG, total_NG, 0, kind.highest_scale)
    scales = _Scales(super_scale_N1, super_min_N1, int_scale_NG, int_min_NG)
    for _ in range(rounds):
        scales = _descend(blocks, scales)
    return scales


def _fit_groups(blocks: _Blocks, widths: int) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, G] of every group alone."""
    x, w, top = blocks.weight, blocks.importance, 2**blocks.kind.bits - 1
    if blocks.kind.symmetric:
        extreme = x.gather(2, x.abs().argmax(2, keepdim=True))  # gets the lowest level, the one without a counterpart
        start, unit = torch.zeros_like(extreme), extreme / -blocks.zero
    else:
        start = x.amin(2, keepdim=True).clamp_max(0.0)
        unit = (x.amax(2, keepdim=True) - start) / top
    unit = torch.where(unit == 0, SMALLEST, unit)
    sum_w, sum_x, sum_xx = w.sum(2), (w * x).sum(2), (w * x * x).sum(2)
    best = (torch.full_like(sum_w, torch.inf), unit.squeeze(2), -start.squeeze(2))
    for step in range(widths):
        shrink = 1.0 if widths == 1 else 1.1 - 0.6 * step / widths
        level = ((x - start) / (unit * shrink)).round_().add_(blocks.zero).clamp_(0, top).sub_(blocks.zero)
        weighted = w * level
        sum_l, sum_ll, sum_xl = weighted.sum(2), (weighted * level).sum(2), (weighted * x).sum(2)
        alone = sum_xl / sum_ll.clamp_min(torch.finfo(torch.float32).tiny)
        if blocks.kind.symmetric:
            scale, low = alone, torch.zeros_like(alone)
        else:
            determinant = (sum_w * sum_ll - sum_l * sum_l).clamp_min(torch.finfo(torch.float32).tiny)
            low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
            scale = torch.where(low > 0, alone, (sum_w * sum_xl - sum_x * sum_l) / determinant)
            low = low.clamp_max(0.0)
        error = sum_xx - 2 * (scale * sum_xl + low * sum_x) + scale * scale * sum_ll
        error += 2 * scale * low * sum_l + low * low * sum_w
        better = error < best[0]
        if widths > 1:
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, -low), best, strict=True))
    return best[1], best[2]


def _commit(value_NG: Tensor, weight_NG: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """A float16 [N, 1] and integers [N, G] whose products are nearest to values, in weighted squares."""
    largest = value_NG.gather(1, value_NG.abs().argmax(1, keepdim=True))
    end = lowest if lowest < 0 else highest
    best = None
    for step in range(-8, 9):
        candidate = _float16(largest / (end * (1 + 0.01 * step)))
        whole = (value_NG / candidate).round_().clamp_(lowest, highest)
        # the least-squares factor of these integers
        factor = (weight_NG * whole * value_NG).sum(1, keepdim=True)
        factor = _float16(factor / (weight_NG * whole * whole).sum(1, keepdim=True).clamp_min(1e-30))
        whole = (value_NG / factor).round_().clamp_(lowest, highest)
        error = (weight_NG * (value_NG - factor * whole).square()).sum(1, keepdim=True)
        if best is None:
            best = error, factor, whole
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, factor, whole), best, strict=True))
    assert best is not None
    return best[1], best[2]


def _descend(blocks: _Blocks, scales: _Scales) -> _Scales:
    """One round: d and dmin, then s and m."""
    kind = blocks.kind
    # d and dmin, by least squares on the codes
    level = _levels(blocks, scales)
    a, x, w = level * scales.scale_NG.unsqueeze(2), blocks.weight, blocks.importance
    dims = (1, 2)
    aa, ax = (w * a * a).sum(dims), (w * a * x).sum(dims)
    if kind.symmetric:
        new_scale, new_min = ax / aa.clamp_min(1e-30), scales.super_min_N1[:, 0]
    else:
        b = -scales.min_NG.unsqueeze(2).expand_as(x)
        ab, bb, bx = (w * a * b).sum(dims), (w * b * b).sum(dims), (w * b * x).sum(dims)
        det = aa * bb - ab * ab
        usable = det > 1e-6 * aa * bb
        safe = torch.where(usable, det, 1.0)
        new_scale = torch.where(usable, (bb * ax - ab * bx) / safe, scales.super_scale_N1[:, 0])
        new_min = torch.where(usable, (aa * bx - ab * ax) / safe, scales.super_min_N1[:, 0])
        new_min = torch.where(new_min > 0, new_min, scales.super_min_N1[:, 0])
    tried = replace(
        scales, super_scale_N1=_float16(new_scale.unsqueeze(1)), super_min_N1=_float16(new_min.unsqueeze(1))
    )
    better = _errors(blocks, tried).sum(1, keepdim=True) < _errors(blocks, scales).sum(1, keepdim=True)
    scales = replace(
        scales,
        super_scale_N1=torch.where(better, tried.super_scale_N1, scales.super_scale_N1),
        super_min_N1=torch.where(better, tried.super_min_N1, scales.super_min_N1),
    )
    # s and m, each by one
    best, scale, minimum = _errors(blocks, scales), scales.scale_NG, scales.min_NG
    moves = [(-1, 0), (1, 0)] if kind.symmetric else [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)]
    for up, more in moves:
        tried = replace(
            scales,
            scale_NG=(scales.scale_NG + up).clamp_(kind.lowest_scale, kind.highest_scale),
            min_NG=(scales.min_NG + more).clamp_(0, kind.highest_scale),
        )
        error = _errors(blocks, tried)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, tried.scale_NG, scale), torch.where(better, tried.min_NG, minimum)
    return replace(scales, scale_NG=scale, min_NG=minimum)


def _levels(blocks: _Blocks, scales: _Scales) -> Tensor:
    """Nearest levels on given scales, [N, G, S]."""
    real = (scales.super_scale_N1 * scales.scale_NG).unsqueeze(2)
    offset = (scales.super_min_N1 * scales.min_NG).unsqueeze(2)
    top = 2**blocks.kind.bits - 1 - blocks.zero
    return ((blocks.weight + offset) / torch.where(real == 0, 1e-20, real)).round_().clamp_(-blocks.zero, top)


def _errors(blocks: _Blocks, scales: _Scales) -> Tensor:
    """Error of each group on given scales, [N, G]."""
    real = (scales.super_scale_N1 * scales.scale_NG).unsqueeze(2)
    offset = (scales.super_min_N1 * scales.min_NG).unsqueeze(2)
    top = 2**blocks.kind.bits - 1 - blocks.zero
    shifted = blocks.weight + offset
    level = (shifted / torch.where(real == 0, 1e-20, real)).round_().clamp_(-blocks.zero, top)
    return (blocks.importance * level.mul_(real).sub_(shifted).square_()).sum(2)


def _float16(value: Tensor) -> Tensor:
    """Rounded to what is stored; not to 0."""
    rounded = value.half().float()
    return torch.where(rounded == 0, SMALLEST, rounded)
