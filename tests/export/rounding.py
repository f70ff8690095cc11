"""Round-to-nearest with min-max ranges: the shortest way to codes for tests that are about files, not about methods.

Symmetric scales have the sign that gives the largest weight of a group the lowest level, so that files hold both signs.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from moeq.quant.spec import QuantizedWeight

# Bits, group size, symmetric: every width that files use, groups and whole rows, with and without zero points.
GRIDS = ((3, 8, False), (4, None, True), (2, 16, False), (8, None, False), (3, 32, True), (1, 16, True))
E2M1 = [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
ROUTERS = (
    "lm_head", "gate", "router", "shared_expert_gate", "proj", "per_layer_input_gate", "per_layer_projection",
    "weights_proj",
)  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def round_weight(weight_OI: Tensor, bits: int, group_size: int | None, symmetric: bool) -> QuantizedWeight:
    rows, columns = weight_OI.shape
    groups_OGg = weight_OI.float().view(rows, -1, group_size or columns)
    levels = 2**bits - 1
    if bits == 1:
        scale_OG = (2 * groups_OGg.abs().mean(-1)).clamp_min(1e-5).to(weight_OI.dtype)
        return QuantizedWeight((weight_OI > 0).to(torch.uint8), scale_OG, None, 1, group_size)
    if symmetric:
        sign_OG = torch.where(groups_OGg.amax(-1) > -groups_OGg.amin(-1), -1.0, 1.0)
        scale_OG = (sign_OG * (groups_OGg.abs().amax(-1) * 2 / levels).clamp_min(1e-5)).to(weight_OI.dtype)
        zero_OG = torch.full(scale_OG.shape, float(2 ** (bits - 1)))
    else:
        low, high = groups_OGg.amin(-1).clamp(max=0), groups_OGg.amax(-1).clamp(min=0)
        scale_OG = ((high - low) / levels).clamp_min(1e-5).to(weight_OI.dtype)
        zero_OG = (-low / scale_OG.float()).round().clamp(0, levels)
    codes = (groups_OGg / scale_OG.float()[..., None] + zero_OG[..., None]).round().clamp(0, levels)
    return QuantizedWeight(
        codes.to(torch.uint8).view(rows, columns),
        scale_OG,
        None if symmetric else zero_OG.to(torch.uint8),
        bits,
        group_size,
    )


def round_float(weight_OI: Tensor, kind: Literal["mxfp4", "nvfp4"]) -> QuantizedWeight:
    """To the nearest float of 4 bits in units of a power of two, or of a float of 8 bits times 2^-7 (NVFP4).

    Scales of NVFP4 are odd multiples of their last place where they can be, so that files hold all their bits.
    """
    size = 16 if kind == "nvfp4" else 32
    groups_OGg = weight_OI.float().unflatten(1, (-1, size))
    scale_OG = groups_OGg.abs().amax(-1) / 6
    scale_OG = (scale_OG * 128).to(torch.float8_e4m3fn).float() / 128 if size == 16 else scale_OG.log2().round().exp2()
    codes = (groups_OGg.unsqueeze(-1) / scale_OG[..., None, None] - torch.tensor(E2M1)).abs().argmin(-1)
    return QuantizedWeight(codes.to(torch.uint8).flatten(1), scale_OG.to(weight_OI.dtype), None, 4, size, table=kind)


def real_weight(weight: QuantizedWeight) -> Tensor:
    """One group at a time."""
    real = torch.empty(weight.codes_OI.shape)
    for group, columns in enumerate(
        torch.arange(weight.codes_OI.shape[1]).split(weight.group_size or weight.codes_OI.shape[1])
    ):
        middle = 0.5 if weight.bits == 1 else 2 ** (weight.bits - 1)
        zero = middle if weight.zero_point_OG is None else weight.zero_point_OG[:, group, None].float()
        codes = weight.codes_OI[:, columns]
        levels = codes.float() - zero if weight.table is None else torch.tensor(E2M1)[codes.long()]
        real[:, columns] = levels * weight.scale_OG[:, group, None].float()
    return real.to(weight.scale_OG.dtype)


@torch.no_grad()
def round_model(model: nn.Module, *, keep_every: int = 7) -> dict[str, QuantizedWeight]:
    """Round most linears and expert projections in place on cycling grids; every ``keep_every``-th stays as it is."""
    views: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed"):
            width = module.gate_up_proj.shape[1] // 2
            for e in range(module.num_experts):
                views[f"{path}.{e}.gate_proj"] = module.gate_up_proj[e, :width]
                views[f"{path}.{e}.up_proj"] = module.gate_up_proj[e, width:]
                views[f"{path}.{e}.down_proj"] = module.down_proj[e]
        elif isinstance(module, nn.Linear) and path.rpartition(".")[2] not in ROUTERS:
            views[path] = module.weight
    grids = itertools.cycle(GRIDS)
    quantized = {}
    for i, (name, view) in enumerate(views.items()):
        if i % keep_every:
            quantized[name] = round_weight(view, *next(grids))
            view.copy_(real_weight(quantized[name]))
    return quantized
