"""What tests of two-level grids share: weights with every number that a grid can hold, and their values."""

from pathlib import Path

import torch
from torch import Tensor

from moeq.quant.kinds import TWO_LEVEL, Kind
from moeq.quant.spec import QuantizedWeight, SuperScales
from tests.tiny import tiny_model, tiny_tokenizer


def save_wide(folder: Path) -> Path:
    """A tiny model with rows of 256, but for those of the experts' down projections, which have 32."""
    wide = {"hidden_size": 256, "num_attention_heads": 8, "shared_expert_intermediate_size": 256, "num_experts": 4}
    model = tiny_model("qwen2_moe", dtype=torch.bfloat16, **wide)
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim >= 2):
        matrix.mul_(0.5)  # four times the inputs of other tiny models, outputs of the same size
    model.save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weight_with_every_number(
    kind: Kind, *, rows: int = 5, supers: int = 3, dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Codes, integers and halves at random over all that the grid can hold."""
    known, generator = TWO_LEVEL[kind], torch.Generator().manual_seed(len(kind) + rows)

    def integers(low: int, high: int, columns: int, of: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, (rows, columns), generator=generator).to(of)

    groups = supers * known.num_groups
    minimum = None if known.symmetric else integers(0, known.highest_scale, groups, torch.int8)
    half = torch.randn(2, rows, supers, generator=generator).half()
    held = SuperScales(kind, half[0], None if known.symmetric else half[1], dtype)
    scale = integers(known.lowest_scale, known.highest_scale, groups, torch.int8)
    codes = integers(0, 2**known.bits - 1, supers * 256, torch.uint8)
    return QuantizedWeight(codes, scale, minimum, known.bits, known.group_size, held)


def reference_values(weight: QuantizedWeight) -> Tensor:
    """Number by number, in exact arithmetic, rounded to float32 once and then to the weight's dtype."""
    assert weight.super_scales is not None
    known = TWO_LEVEL[weight.kind]
    rows = []
    for row, codes in enumerate(weight.codes_OI.tolist()):
        values = []
        for column, code in enumerate(codes):
            group, block = column // known.group_size, column // 256
            value = float(weight.super_scales.scale_OB[row, block]) * int(weight.scale_OG[row, group])
            value *= code - 2 ** (known.bits - 1) if known.symmetric else code
            if weight.zero_point_OG is not None and weight.super_scales.min_OB is not None:
                value -= float(weight.super_scales.min_OB[row, block]) * int(weight.zero_point_OG[row, group])
            values.append(value)
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64).float().to(weight.dtype)
