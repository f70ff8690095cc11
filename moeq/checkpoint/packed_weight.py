"""The tensors that one packed weight is stored as, and back: its grid, its parts by name, its values.

``weight = (code - zero_point) * scale`` in float32, rounded to the dtype of the scales, which is the dtype the weight
had in the evaluated model: the same numbers whatever dtype the checkpoint is opened in.

On a two-level grid (``moeq.quant.kinds``) ``weight_scale`` and ``weight_min`` are d and dmin, float16, and the integers
of the groups are packed as codes are, in ``weight_sub_scale`` and ``weight_sub_min``.  A weight whose levels stand in a
table has the parts of a symmetric uniform one; its kind says what codes mean.

Shape suffixes: O out, I in, G groups, B super-blocks, W words.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.quant.grid import dequantize_weight
from moeq.quant.kinds import TABLES, TWO_LEVEL, StoredKind
from moeq.quant.packing import pack, unpack
from moeq.quant.spec import GridSpec, QuantizedWeight, SuperScales

# Parameters of a packed weight, of which each kind of grid has some.
PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_min", "weight_sub_scale", "weight_sub_min",
    "weight_shape",
)  # fmt: skip
# Weights that a core dequantizes at once.
CHUNK = 1 << 16


@dataclass(frozen=True)
class PackedFormat:
    """Grid of one packed weight: bits per code, in-features per scale (None: the row), symmetric or not, its kind."""

    bits: int
    group_size: int | None
    symmetric: bool
    kind: StoredKind = "uniform"

    @classmethod
    def of(cls, grid: GridSpec) -> "PackedFormat":
        """That of weights on a grid."""
        return cls(grid.bits, grid.group_size, grid.symmetric, grid.stored_kind)

    @property
    def spec(self) -> GridSpec:
        """The grid, as the solvers know it."""
        return GridSpec(self.bits, self.group_size, self.symmetric, kind=self.kind)

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it: a kind is told where it is not uniform."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("kind", "uniform")}


def dequantize_codes(weight: QuantizedWeight) -> Tensor:
    """Real weights of codes, [O, I], in the dtype of the scales: by the formula with which the fit wrote them.

    On a CPU some rows at a time, so that what is between stays in the cache of its cores: half the time.
    """
    dtype, (rows, columns) = weight.dtype, weight.codes_OI.shape
    step = max(1, CHUNK * torch.get_num_threads() // columns)
    if weight.codes_OI.device.type != "cpu" or rows <= step:
        return dequantize_weight(weight, dtype)
    weight_OI = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight_OI[part] = dequantize_weight(weight.rows(part), dtype)
    return weight_OI


def packed_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Tensors of a ``PackedLinear`` for one quantized weight, by parameter name."""
    supers = weight.super_scales
    tensors = {
        "weight_packed": pack(weight.codes_OI, weight.bits),
        "weight_scale": (weight.scale_OG if supers is None else supers.scale_OB).contiguous(),
        "weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
    }
    if supers is not None:
        kind = TWO_LEVEL[supers.kind]
        tensors["weight_sub_scale"] = _pack_integers(weight.scale_OG, kind.lowest_scale, kind.scale_bits)
        if weight.zero_point_OG is not None and supers.min_OB is not None:
            tensors["weight_min"] = supers.min_OB.contiguous()
            tensors["weight_sub_min"] = _pack_integers(weight.zero_point_OG, 0, kind.scale_bits)
    elif weight.zero_point_OG is not None:
        tensors["weight_zero_point"] = pack(weight.zero_point_OG.mT, weight.bits).mT.contiguous()
    return tensors


def unpacked_weight(
    parts: Mapping[str, Tensor], grid: PackedFormat, shape: tuple[int, int], dtype: torch.dtype
) -> QuantizedWeight:
    """The inverse of ``packed_tensors``.

    Args:
        parts: Tensors by parameter name.
        grid: Of the weight.
        shape: O, I.
        dtype: Of the dequantized weight.
    """
    rows, columns = shape
    codes_OI = unpack(parts["weight_packed"], grid.bits, columns)
    if grid.kind not in TWO_LEVEL:
        zero_OG = None
        if not grid.symmetric:
            zero_OG = unpack(parts["weight_zero_point"].mT, grid.bits, rows).mT.contiguous()
        table = grid.kind if grid.kind in TABLES else None
        return QuantizedWeight(codes_OI, parts["weight_scale"], zero_OG, grid.bits, grid.group_size, table=table)
    kind, groups = TWO_LEVEL[grid.kind], grid.spec.num_groups(columns)
    scale_OG = _unpack_integers(parts["weight_sub_scale"], kind.lowest_scale, kind.scale_bits, groups)
    min_OG = None
    if not grid.symmetric:
        min_OG = _unpack_integers(parts["weight_sub_min"], 0, kind.scale_bits, groups)
    supers = SuperScales(grid.kind, parts["weight_scale"], parts.get("weight_min"), dtype)
    return QuantizedWeight(codes_OI, scale_OG, min_OG, grid.bits, grid.group_size, supers)


def _pack_integers(value_OG: Tensor, lowest: int, bits: int) -> Tensor:
    """Integers of groups (int8), from their lowest on."""
    return pack((value_OG.short() - lowest).to(torch.uint8), bits)


def _unpack_integers(packed: Tensor, lowest: int, bits: int, num: int) -> Tensor:
    return (unpack(packed, bits, num).short() + lowest).to(torch.int8)
