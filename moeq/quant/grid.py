"""Uniform integer grids: choose scales and zero points, quantize, dequantize.

    code = clamp(round(weight / scale) + zero_point, 0, 2^bits - 1),        real = (code - zero_point) * scale

Asymmetric: scale = (max - min) / (2^bits - 1) over the group's range, which is widened to contain 0, and zero_point =
round(-min / scale).  Symmetric: all levels -2^(bits-1) .. 2^(bits-1)-1 with scale = max|w| / (2^(bits-1) - 1) and the
fixed zero point 2^(bits-1), so that both ends of the range are levels and the lowest level serves clipped values.
Full-range symmetric: the same levels, with a scale of either sign.  The largest weight gets code 0, scale = -weight /
2^(bits-1), so that no level is spare (AutoRound's ``full_range_sym``; Q4_0 of llama.cpp).  One bit: a weight becomes
its sign times scale / 2, which is the mean magnitude of its group (XNOR-Net, Rastegari et al., 2016, eq. 6).

Ranges that are searched instead: ``moeq.quant.ranges``.

Shapes: E experts, O out features, I in features, G groups per row, N groups of all rows, S in features per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.quant.kinds import TABLES, TableKind
from moeq.quant.ranges import scales_of_groups
from moeq.quant.spec import GridSpec, QuantizedWeight, SuperScales, middle
from moeq.quant.tables import level_values, nearest_codes, table_scales
from moeq.quant.two_level import add_offset, divisor, group_offset, group_scale
from moeq.quant.two_level_search import choose_two_level

# Elements per chunk of the clip search: what stays in a core's L2 cache, and what bounds the workspace on a GPU.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 24


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of a stack of weights.

    Attributes:
        scale_EOG: Finite and normal, in its storage dtype; positive, unless the grid is full-range or a table;
            0 for groups of zeros on a table, or of one bit.
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
        known = self.super_scales
        return divisor(self.scale_EOG.float() if known is None else group_scale(self.scale_EOG, known))

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
    shape = (num_experts, out_features, groups)
    if grid.table is not None:
        whole_N = weight_EOI.abs().amax((1, 2)).float().repeat_interleave(out_features * groups)
        wholes = whole_N.split(len(chunks[0]))
        scales = [
            table_scales(chunk_NS.float(), grid, scale_dtype, part_N)
            for chunk_NS, part_N in zip(chunks, wholes, strict=True)
        ]
        return QParams(torch.cat(scales).to(scale_dtype).view(shape), None)
    results = [scales_of_groups(chunk_NS.float(), grid, scale_dtype) for chunk_NS in chunks]
    scale_EOG = torch.cat([scale_N for scale_N, _ in results]).to(scale_dtype).view(shape)
    if grid.symmetric:
        return QParams(scale_EOG, None)
    return QParams(scale_EOG, torch.cat([zero_N for _, zero_N in results]).to(torch.uint8).view(shape))


def quantize(weight_EOI: Tensor, qparams: QParams, grid: GridSpec) -> Tensor:
    """Codes of the nearest levels: uint8 [E, O, I], each in [0, 2^bits)."""
    shape_EOGS = (*qparams.scale_EOG.shape, -1)
    ratio_EOGS = qparams.shift(weight_EOI.float()).reshape(shape_EOGS) / qparams.divisors().unsqueeze(-1)
    if grid.table is not None:
        return nearest_codes(ratio_EOGS, grid.table).to(torch.uint8).view(weight_EOI.shape)
    if grid.bits == 1:
        return (ratio_EOGS > 0).to(torch.uint8).view(weight_EOI.shape)
    levels_EOGS = ratio_EOGS.round_()
    levels_EOGS += broadcast_zero(qparams.zero_point_EOG, grid.bits, qparams.super_scales)
    return levels_EOGS.clamp_(0, 2**grid.bits - 1).to(torch.uint8).view(weight_EOI.shape)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, super_scales: SuperScales | None = None,
    table: TableKind | None = None,
) -> Tensor:  # fmt: skip
    """``(code - zero_point) * scale`` in float32, for codes [..., O, I] and scales [..., O, G].

    With ``super_scales`` the formula of two-level grids (``moeq.quant.two_level``), with a table that of its levels.
    """
    if table is not None:
        return level_values(codes, table).view(*scale.shape, -1).mul_(scale.float().unsqueeze(-1)).view(codes.shape)
    levels = codes.float().view(*scale.shape, -1) - broadcast_zero(zero_point, bits, super_scales)
    if super_scales is None:
        return levels.mul_(scale.float().unsqueeze(-1)).view(codes.shape)
    levels.mul_(group_scale(scale, super_scales).unsqueeze(-1))
    offset = group_offset(zero_point, super_scales)
    return (levels if offset is None else levels.sub_(offset.unsqueeze(-1))).view(codes.shape)


def dequantize_weight(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that a quantized weight stands for: float32 arithmetic, then one cast to ``dtype``."""
    q = quantized
    table = None if q.table is None else TABLES[q.table]
    return dequantize(q.codes_OI, q.scale_OG, q.zero_point_OG, q.bits, q.super_scales, table).to(dtype)


def real_values(codes_EOI: Tensor, qparams: QParams, grid: GridSpec) -> Tensor:
    """``dequantize`` of a stack of codes."""
    parts = qparams.scale_EOG, qparams.zero_point_EOG, grid.bits, qparams.super_scales
    return dequantize(codes_EOI, *parts, grid.table)


def lowest_level(qparams: QParams, grid: GridSpec) -> Tensor:
    """The level of code 0 of each group, minus the zero point: float32 [E, O, G]."""
    if qparams.zero_point_EOG is None:
        return torch.full_like(qparams.scale_EOG, -middle(grid.bits), dtype=torch.float32)
    if qparams.super_scales is not None:
        return torch.zeros_like(qparams.scale_EOG, dtype=torch.float32)
    return -qparams.zero_point_EOG.float()


def broadcast_zero(zero_point: Tensor | None, bits: int, super_scales: SuperScales | None) -> Tensor | float:
    """Zero points [..., G, 1] to broadcast over a group; a symmetric grid has a constant, one with offsets none."""
    if zero_point is None:
        return middle(bits)
    return zero_point.float().unsqueeze(-1) if super_scales is None else 0.0
