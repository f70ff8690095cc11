"""Uniform integer grids: choose scales and zero points, quantize, dequantize.

    code = clamp(round(weight / scale) + zero_point, 0, 2^bits - 1),        real = (code - zero_point) * scale

Asymmetric: scale = (max - min) / (2^bits - 1) over the group's range, which is widened to contain 0, and zero_point =
round(-min / scale).  Symmetric: all levels -2^(bits-1) .. 2^(bits-1)-1 with scale = max|w| / (2^(bits-1) - 1) and the
fixed zero point 2^(bits-1), so that both ends of the range are levels and the lowest level serves clipped values.

The clip search (GPTQ's published code: norm 2.4, steps of 1/100, down to a fifth) takes, per group, the range
p * (min, max), p = 1, 0.99, ..., 0.21, with the least sum |real - weight|^2.4; p = 1 is the first candidate, so the
result is never worse than min-max.  Every candidate scale is rounded to the dtype it is stored in before it is judged.

Shapes: E experts, O out features, I in features, G groups per row, N groups of all rows, S in features per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.quant.spec import GridSpec, QuantizedWeight

CLIP_NORM = 2.4
CLIP_STEPS = 80
CLIP_STEP = 0.01
# Elements per chunk of the clip search: what stays in a core's L2 cache, and what bounds the workspace on a GPU.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of a stack of weights.

    Attributes:
        scale_EOG: Positive, finite and normal, in its storage dtype.
        zero_point_EOG: uint8, or None for a symmetric grid.
    """

    scale_EOG: Tensor
    zero_point_EOG: Tensor | None

    def experts(self, part: slice) -> "QParams":
        """Parameters of some experts, still as a stack."""
        return QParams(self.scale_EOG[part], None if self.zero_point_EOG is None else self.zero_point_EOG[part])


def choose_qparams(weight_EOI: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> QParams:
    """Scale and zero point of every group, by min-max or by the clip search.

    Args:
        weight_EOI: Finite weights, any float dtype.
        grid: Bits, groups, symmetry, clip search.
        scale_dtype: Storage dtype of the scales.  Scales below its smallest normal number are raised to it (this loses
            precision only where the whole group is of that size); groups of zeros get scale 1.

    Returns:
        QParams with scale_EOG [E, O, G] and zero_point_EOG [E, O, G] or None.

    Raises:
        ValueError: The group size does not divide the in features.
    """
    num_experts, out_features, in_features = weight_EOI.shape
    groups = grid.num_groups(in_features)
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
    scale_EOG1 = qparams.scale_EOG.float().unsqueeze(-1)
    levels_EOGS = (weight_EOI.float().reshape(shape_EOGS) / scale_EOG1).round_()
    levels_EOGS += _zero_point(qparams.zero_point_EOG, grid.bits)
    return levels_EOGS.clamp_(0, 2**grid.bits - 1).to(torch.uint8).view(weight_EOI.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """``(code - zero_point) * scale`` in float32, for codes [..., O, I] and scales [..., O, G]."""
    levels = codes.float().view(*scale.shape, -1) - _zero_point(zero_point, bits)
    return levels.mul_(scale.float().unsqueeze(-1)).view(codes.shape)


def dequantize_weight(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that a quantized weight stands for: float32 arithmetic, then one cast to ``dtype``."""
    weight_OI = dequantize(quantized.codes_OI, quantized.scale_OG, quantized.zero_point_OG, quantized.bits)
    return weight_OI.to(dtype)


def lowest_level(qparams: QParams, grid: GridSpec) -> Tensor:
    """The level of code 0 of each group, minus the zero point: float32 [E, O, G]."""
    if qparams.zero_point_EOG is None:
        return torch.full_like(qparams.scale_EOG, -(2 ** (grid.bits - 1)), dtype=torch.float32)
    return -qparams.zero_point_EOG.float()


def _zero_point(zero_point: Tensor | None, bits: int) -> Tensor | float:
    """Zero points [..., G, 1] to broadcast over a group; a symmetric grid has a constant."""
    return float(2 ** (bits - 1)) if zero_point is None else zero_point.float().unsqueeze(-1)


def _choose_chunk(rows_NS: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N], float32 with values of their storage dtypes, of some groups (float32 [N, S])."""
    low_N, high_N = rows_NS.amin(1).clamp_(max=0.0), rows_NS.amax(1).clamp_(min=0.0)  # aminmax is 10 x slower
    scale_N, zero_N = qparams_of_range(low_N, high_N, grid, scale_dtype)
    if not grid.clip_search:
        return scale_N, zero_N
    minmax_scale_N = scale_N
    best_N = torch.full_like(scale_N, torch.inf)
    work = (torch.empty_like(rows_NS), torch.empty_like(rows_NS))
    for step in range(CLIP_STEPS):
        shrink = 1.0 - step * CLIP_STEP
        candidate_N, candidate_zero_N = qparams_of_range(shrink * low_N, shrink * high_N, grid, scale_dtype)
        error_N = _clip_error(rows_NS, candidate_N, candidate_zero_N, grid.bits, work)
        # The error is in units of the candidate scale; a ratio of scales keeps tiny weights out of the subnormals.
        error_N *= (candidate_N / minmax_scale_N).pow_(CLIP_NORM)
        better_N = error_N < best_N
        best_N = torch.where(better_N, error_N, best_N)
        scale_N = torch.where(better_N, candidate_N, scale_N)
        zero_N = torch.where(better_N, candidate_zero_N, zero_N)
    return scale_N, zero_N


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
