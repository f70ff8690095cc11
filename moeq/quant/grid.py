"""Uniform integer grids: choose scales and zero points, quantize, dequantize.

    code = clamp(round(weight / scale) + zero_point, 0, 2^bits - 1),        real = (code - zero_point) * scale

Asymmetric: scale = (max - min) / (2^bits - 1) over the group's range, which is widened to contain 0, and zero_point =
round(-min / scale).  Symmetric: all levels -2^(bits-1) .. 2^(bits-1)-1 with scale = max|w| / (2^(bits-1) - 1) and the
fixed zero point 2^(bits-1), so that both ends of the range are levels and the lowest level serves clipped values.

The clip search (GPTQ's published code: norm 2.4, steps of 1/100, down to a fifth) takes, per group, the range
p * (min, max), p = 1, 0.99, ..., 0.21, with the least sum |real - weight|^2.4; p = 1 is the first candidate, so the
result is never worse than min-max.  Every candidate scale is rounded to the dtype it is stored in before it is judged.
A group leaves the search once what the candidate's ends cut off its weights costs more than its best candidate in all:
later candidates cut off more.  By Hoelder's inequality, cutting off x costs sum x^2.4 >= (sum x^2)^1.4 / (sum x)^0.4.

Shapes: E experts, O out features, I in features, G groups per row, N groups of all rows, S in features per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.quant.spec import GridSpec, QuantizedWeight, SuperScales
from moeq.quant.two_level import add_offset, divisor, group_offset, group_scale
from moeq.quant.two_level_search import choose_two_level

CLIP_NORM = 2.4
CLIP_STEPS = 80
CLIP_STEP = 0.01
CLIP_CHECK = 16  # candidates between two looks at which groups are done
# Elements per chunk of the clip search: what stays in a core's L2 cache, and what bounds the workspace on a GPU.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of a stack of weights.

    Attributes:
        scale_EOG: Positive, finite and normal, in its storage dtype.
        zero_point_EOG: uint8, or None for a symmetric grid.
        super_scales: Of a two-level grid, on which the two above are integers (``QuantizedWeight``); else None.
    """

    scale_EOG: Tensor
    zero_point_EOG: Tensor | None
    super_scales: SuperScales | None = None

    def experts(self, part: slice) -> "QParams":
        """Parameters of some experts, still as a stack."""
        return QParams(
            self.scale_EOG[part],
            None if self.zero_point_EOG is None else self.zero_point_EOG[part],
            None if self.super_scales is None else self.super_scales.each(lambda tensor: tensor[part]),
        )

    def divisors(self) -> Tensor:
        """Scales of the groups to divide by, float32 [E, O, G]."""
        if self.super_scales is None:
            return self.scale_EOG.float()
        return divisor(group_scale(self.scale_EOG, self.super_scales))

    def shift(self, weight_EOI: Tensor) -> Tensor:
        """What is to be rounded to multiples of the scales: the weights, plus the offsets of a two-level grid."""
        if self.super_scales is None:
            return weight_EOI
        return add_offset(weight_EOI, self.zero_point_EOG, self.super_scales)


def choose_qparams(
    weight_EOI: Tensor, grid: GridSpec, scale_dtype: torch.dtype, importance_EI: Tensor | None = None
) -> QParams:
    """Scale and zero point of every group, by min-max or by the clip search; of a two-level grid by its own search.

    Args:
        weight_EOI: Finite weights, any float dtype.
        grid: Bits, groups, symmetry, clip search.
        scale_dtype: Storage dtype of the scales.  Scales below its smallest normal number are raised to it (this loses
            precision only where the whole group is of that size); groups of zeros get scale 1.  The dtype of the
            weights on a two-level grid, whose scales are float16 and integers.
        importance_EI: How much the error of an in feature counts, not negative; on a two-level grid only.

    Returns:
        QParams with scale_EOG [E, O, G] and zero_point_EOG [E, O, G] or None.

    Raises:
        ValueError: The group size does not divide the in features.
    """
    num_experts, out_features, in_features = weight_EOI.shape
    groups = grid.num_groups(in_features)
    if grid.two_level is not None:
        return QParams(*choose_two_level(weight_EOI, grid, scale_dtype, importance_EI))
    rows_NS = weight_EOI.reshape(-1, in_features // groups)
    budget = CPU_CHUNK if weight_EOI.device.type == "cpu" else GPU_CHUNK
    chunks = rows_NS.split(max(1, budget // rows_NS.shape[1]))
    results = [_choose_chunk(chunk_NS.float(), grid, scale_dtype) for chunk_NS in chunks]
    shape = (num_experts, out_features, groups)
    scale_EOG = torch.cat([scale_N for scale_N, _ in results]).to(scale_dtype).view(shape)
    if grid.symmetric:
        return QParams(scale_EOG, None)
    return QParams(scale_EOG, torch.cat([zero_N for _, zero_N in results]).to(torch.uint8).view(shape))


def quantize(weight_EOI: Tensor, qparams: QParams, grid: GridSpec) -> Tensor:
    """Codes of the nearest levels: uint8 [E, O, I], each in [0, 2^bits)."""
    shape_EOGS = (*qparams.scale_EOG.shape, -1)
    levels_EOGS = (qparams.shift(weight_EOI.float()).reshape(shape_EOGS) / qparams.divisors().unsqueeze(-1)).round_()
    levels_EOGS += broadcast_zero(qparams.zero_point_EOG, grid.bits, qparams.super_scales)
    return levels_EOGS.clamp_(0, 2**grid.bits - 1).to(torch.uint8).view(weight_EOI.shape)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, super_scales: SuperScales | None = None
) -> Tensor:
    """``(code - zero_point) * scale`` in float32, for codes [..., O, I] and scales [..., O, G].

    With ``super_scales`` the formula of two-level grids (``moeq.quant.two_level``).
    """
    levels = codes.float().view(*scale.shape, -1) - broadcast_zero(zero_point, bits, super_scales)
    if super_scales is None:
        return levels.mul_(scale.float().unsqueeze(-1)).view(codes.shape)
    levels.mul_(group_scale(scale, super_scales).unsqueeze(-1))
    offset = group_offset(zero_point, super_scales)
    return (levels if offset is None else levels.sub_(offset.unsqueeze(-1))).view(codes.shape)


def dequantize_weight(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that a quantized weight stands for: float32 arithmetic, then one cast to ``dtype``."""
    q = quantized
    return dequantize(q.codes_OI, q.scale_OG, q.zero_point_OG, q.bits, q.super_scales).to(dtype)


def real_values(codes_EOI: Tensor, qparams: QParams, grid: GridSpec) -> Tensor:
    """``dequantize`` of a stack of codes."""
    return dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, grid.bits, qparams.super_scales)


def lowest_level(qparams: QParams, grid: GridSpec) -> Tensor:
    """The level of code 0 of each group, minus the zero point: float32 [E, O, G]."""
    if qparams.zero_point_EOG is None:
        return torch.full_like(qparams.scale_EOG, -(2 ** (grid.bits - 1)), dtype=torch.float32)
    if qparams.super_scales is not None:
        return torch.zeros_like(qparams.scale_EOG, dtype=torch.float32)
    return -qparams.zero_point_EOG.float()


def broadcast_zero(zero_point: Tensor | None, bits: int, super_scales: SuperScales | None) -> Tensor | float:
    """Zero points [..., G, 1] to broadcast over a group; a symmetric grid has a constant, one with offsets none."""
    if zero_point is None:
        return float(2 ** (bits - 1))
    return zero_point.float().unsqueeze(-1) if super_scales is None else 0.0


def _choose_chunk(rows_NS: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N], float32 with values of their storage dtypes, of some groups (float32 [N, S])."""
    low_N, high_N = rows_NS.amin(1).clamp_(max=0.0), rows_NS.amax(1).clamp_(min=0.0)  # aminmax is 10 x slower
    scale_N, zero_N = qparams_of_range(low_N, high_N, grid, scale_dtype)
    if not grid.clip_search:
        return scale_N, zero_N
    ends = _widest_ends(low_N, high_N, scale_N, grid, torch.finfo(scale_dtype).tiny)
    best_3N = torch.stack([torch.full_like(scale_N, torch.inf), scale_N, zero_N])  # error, scale, zero point
    found_3N, index_N = best_3N, torch.arange(len(rows_NS), device=rows_NS.device)
    fixed_5N = torch.stack([low_N, high_N, scale_N, *ends])
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
        low_N, high_N, minmax_scale_N = fixed_5N[:3]
        candidate_N, candidate_zero_N = qparams_of_range(shrink * low_N, shrink * high_N, grid, scale_dtype)
        error_N = _clip_error(rows_NS, candidate_N, candidate_zero_N, grid.bits, work)
        # The error is in units of the candidate scale; a ratio of scales keeps tiny weights out of the subnormals.
        error_N *= (candidate_N / minmax_scale_N).double().pow_(CLIP_NORM).float()  # float32's depends on the position
        tried_3N = torch.stack([error_N, candidate_N, candidate_zero_N])
        best_3N = torch.where(error_N < best_3N[0], tried_3N, best_3N)
    found_3N[:, index_N] = best_3N
    return found_3N[1], found_3N[2]


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
    limits = torch.finfo(dtype)
    top = 2**grid.bits - 1
    if grid.symmetric:
        scale_N = torch.maximum(-low_N, high_N) / (2 ** (grid.bits - 1) - 1)
    else:
        scale_N = high_N / top - low_N / top  # not (high - low) / top, which can overflow
    empty_N = scale_N == 0
    scale_N = scale_N.clamp_(limits.tiny, limits.max).to(dtype).float().masked_fill_(empty_N, 1.0)
    if grid.symmetric:
        return scale_N, torch.full_like(scale_N, float(2 ** (grid.bits - 1)))
    return scale_N, (-low_N / scale_N).round_().clamp_(0, top)


def _clip_error(rows_NS: Tensor, scale_N: Tensor, zero_N: Tensor, bits: int, work: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over each group of |real - weight|^2.4, in units of scale^2.4; [N].  ``work`` are two buffers [N, S]."""
    exact, error = work
    zero_N1 = zero_N.unsqueeze(1)
    torch.div(rows_NS, scale_N.unsqueeze(1), out=exact)
    # Clamped between two constants after the zero point is added: clamp is ten times slower between two tensors.
    torch.round(exact, out=error).add_(zero_N1).clamp_(0, 2**bits - 1).sub_(exact.add_(zero_N1))
    # (error^2)^1.2 by way of log2: half the time of pow; log2(0) = -inf gives 0.
    return torch.mul(error, error, out=error).log2_().mul_(CLIP_NORM / 2).exp2_().sum(dim=1)
