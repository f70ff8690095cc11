"""AWQ: scale the input channels of a weight up where its inputs are large, and its inputs down by as much.

    W x = (W diag(s)) (x / s),        s_j = a_j^alpha / sqrt(max_j a_j^alpha * min_j a_j^alpha)

leaves the output as it is, but a channel with a large s loses less to rounding (Lin et al., 2023, arXiv 2306.00978,
Eq. 4 and 5).  alpha is taken from a grid of 20 values in [0, 1); the metric is the output error

    sum over the readers of x of tr(D H D^T),     D = W - Q(W diag(s)) diag(1/s),     H = sum_t c_t^p x_t x_t^T

With p = 1 the metric is the affinity-weighted loss of MoEQuant (arXiv 2505.03804, Eq. 18): AGQ-AWQ, "MoEQuant+" in its
tables.  With p = 0 it is AWQ's.  The sums are not divided by tokens, so an expert counts as much as it is used.

AWQ's a_j is the mean of |x_j|; here it is the root mean square, sqrt(sum H_jj), which the Hessians hold already.
alpha = 0 (no scaling) is the first candidate, so the metric is never above that of the weight as it is.

Shapes: E experts, O out features, I in features, G groups per row, C candidates, J channels that are scaled (J = I
unless in features share a channel, as the query heads of one key/value head do).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.quant.clip import clip_by_output_error
from moeq.quant.grid import QParams, choose_qparams, dequantize, quantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution, output_energy
from moeq.quant.spec import GridSpec, QuantizedWeight

NUM_ALPHAS = 20
SMALLEST = 1e-4  # of a_j^alpha, as in the published code: nearly dead channels are not scaled down without bound


@dataclass(frozen=True)
class Reader:
    """One weight that reads the scaled input.

    Attributes:
        weight_OI: Any float dtype.
        hessian_II: Mean over its tokens, float32.
        tokens: Their summed weight c^p, by which its error counts among the readers.
        grid: On which it will be rounded.
    """

    weight_OI: Tensor
    hessian_II: Tensor
    tokens: float
    grid: GridSpec


def search_scale(readers: Sequence[Reader], scale_dtype: torch.dtype, channel_I: Tensor | None = None) -> Tensor:
    """The scale of the grid of alphas with the least output error over all readers, float32 [J].

    Args:
        readers: Everything that is quantized and reads the input.
        scale_dtype: Storage dtype of the quantization scales.
        channel_I: Channel of each in feature, int64; None where each has its own.
    """
    energy_I = torch.stack([reader.tokens * reader.hessian_II.diagonal().double() for reader in readers]).sum(0)
    if channel_I is None:
        channel_I = torch.arange(len(energy_I), device=energy_I.device)
    energy_J = energy_I.new_zeros(int(channel_I.max()) + 1).index_add_(0, channel_I, energy_I)
    scale_CJ = candidate_scales(energy_J.sqrt())
    error_C = torch.stack([_total_error(readers, scale_J[channel_I], scale_dtype) for scale_J in scale_CJ])
    best = int(error_C.argmin())
    # What min-max ranges gain may be gone once every range is searched: the best alpha has to win there too.
    plain, scaled = (_total_error(readers, scale_CJ[c][channel_I], scale_dtype, clip=True) for c in (0, best))
    return scale_CJ[best if bool(scaled < plain) else 0]


def candidate_scales(magnitude_J: Tensor) -> Tensor:
    """Scales for every alpha, float32 [C, J]; the first is 1.  Channels without input keep the scale 1.

    Args:
        magnitude_J: Root mean square of each channel, in any unit.
    """
    live_J = magnitude_J > 0
    if not bool(live_J.any()):
        return torch.ones(1, len(magnitude_J), device=magnitude_J.device)
    unit_J = (magnitude_J / magnitude_J.max()).double()
    scales = []
    for step in range(NUM_ALPHAS):
        power_J = unit_J.pow(step / NUM_ALPHAS).clamp_(min=SMALLEST)
        extremes = power_J[live_J]
        power_J /= (extremes.max() * extremes.min()).sqrt()
        scales.append(torch.where(live_J, power_J, 1.0).float())
    return torch.stack(scales)


def scaled_error(reader: Reader, scale_I: Tensor, scale_dtype: torch.dtype, clip: bool = False) -> Tensor:
    """tr(D H D^T) of a weight that is rounded with scaled channels, a float64 scalar.

    Args:
        reader: Weight, Hessian and grid.
        scale_I: The scale.
        scale_dtype: Storage dtype of the quantization scales.
        clip: On the ranges that the weight will have, with a clip search if its grid asks for one; else on min-max
            ranges, as in the published code.
    """
    scaled_EOI, hessian_EII = scale_problem(reader.weight_OI[None], reader.hessian_II[None], scale_I[None])
    grid = replace(reader.grid, clip_search=clip and reader.grid.clip_search)
    qparams = choose_ranges(scaled_EOI, hessian_EII, grid, scale_dtype)
    codes_EOI = quantize(scaled_EOI, qparams, reader.grid)
    rounded_EOI = dequantize(codes_EOI, qparams.scale_EOG, qparams.zero_point_EOG, reader.grid.bits)
    return output_energy((scaled_EOI - rounded_EOI)[0], hessian_EII[0])


def _total_error(readers: Sequence[Reader], scale_I: Tensor, scale_dtype: torch.dtype, clip: bool = False) -> Tensor:
    errors = [reader.tokens * scaled_error(reader, scale_I, scale_dtype, clip) for reader in readers]
    return torch.stack(errors).sum()


def choose_ranges(weight_EOI: Tensor, hessian_EII: Tensor, grid: GridSpec, scale_dtype: torch.dtype) -> QParams:
    """Scales and zero points: by output error where the grid asks for a clip search, else min-max."""
    if grid.is_named:
        raise ValueError(f"AWQ divides rows of quantized weights, which grid ({grid.kind}) rounds; choose GPTQ for it")
    if grid.clip_search:
        return clip_by_output_error(weight_EOI, hessian_EII, grid, scale_dtype)
    return choose_qparams(weight_EOI, grid, scale_dtype)


def scale_problem(weight_EOI: Tensor, hessian_EII: Tensor, scale_EI: Tensor) -> tuple[Tensor, Tensor]:
    """``W diag(s)`` and ``diag(1/s) H diag(1/s)``, float32: the same outputs, the same error of the output."""
    hessian_EII = hessian_EII / scale_EI.unsqueeze(1) / scale_EI.unsqueeze(2)
    return weight_EOI.float() * scale_EI.unsqueeze(1), hessian_EII


def round_scaled(
    weight_EOI: Tensor, hessian_EII: Tensor, scale_EI: Tensor, grid: GridSpec, scale_dtype: torch.dtype
) -> Solution:
    """Round ``W diag(s)`` to nearest, ranges by output error where the grid asks for a clip search.

    Args:
        weight_EOI: Without the scale.
        hessian_EII: Of the input without the scale; float32, any positive scale.
        scale_EI: Scale of each in feature.
        grid: The integer grid.
        scale_dtype: Storage dtype of the quantization scales.
    """
    weight_EOI, hessian_EII = scale_problem(weight_EOI, hessian_EII, scale_EI)
    qparams = choose_ranges(weight_EOI, hessian_EII, grid, scale_dtype)
    return round_to_nearest(weight_EOI, grid, scale_dtype, hessian_EII, qparams)


def divide_rows(weight: QuantizedWeight, row_J: Tensor, scale_J: Tensor) -> tuple[QuantizedWeight, Tensor]:
    """Divide out features of a quantized weight, whose outputs are the scaled channels; the codes stay.

    The quotients are rounded to the dtype the scales are stored in.  What a row was really divided by is therefore
    returned, for the weight that reads the channel to be multiplied by it: exact with one group per row; with several,
    each group is off from it by at most that dtype's rounding (2^-9 relative in bfloat16).

    Args:
        weight: Codes, scales and zero points [O, I].
        row_J: Row of each channel, int64, each at most once.
        scale_J: Positive.  Limited to what keeps the quotients normal numbers of their dtype.

    Returns:
        The weight and the applied scale, float32 [J].
    """
    limits = torch.finfo(weight.scale_OG.dtype)
    old_JG = weight.scale_OG[row_J].float()
    smallest_J, largest_J = old_JG.abs().amax(1) / limits.max, old_JG.abs().amin(1) / limits.tiny
    scale_J = scale_J.to(old_JG.device).float().clamp(smallest_J, largest_J)
    new_JG = (old_JG / scale_J.unsqueeze(1)).to(weight.scale_OG.dtype)
    scale_OG = weight.scale_OG.clone()
    scale_OG[row_J] = new_JG
    return replace(weight, scale_OG=scale_OG), old_JG.abs().sum(1) / new_JG.float().abs().sum(1)
