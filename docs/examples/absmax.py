"""A quantization method in one file: symmetric rounding whose largest level is the largest weight of the group."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.module import MoEQuantModule
from moeq.quant.grid import QParams, dequantize, quantize
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec
from moeq.solve import Unit, quantize_sites


def absmax(weight_EOI: Tensor, grid: GridSpec, scale_dtype: torch.dtype, shrink: float = 1.0) -> Solution:
    """Quantize a stack of E weights [O, I]; scale = shrink * max|w| / (2^(bits-1) - 1) per group."""
    if not grid.symmetric:
        raise ValueError("symmetric (false) does not fit AbsMax, which has no zero points; set --model.symmetric true")
    groups = weight_EOI.unflatten(-1, (grid.num_groups(weight_EOI.shape[-1]), -1))
    scale_EOG = shrink * groups.abs().amax(-1).clamp_min(1e-8) / (2 ** (grid.bits - 1) - 1)
    qparams = QParams(scale_EOG.to(scale_dtype), None)
    codes_EOI = quantize(weight_EOI, qparams, grid)
    error_EOI = dequantize(codes_EOI, qparams.scale_EOG, None, grid.bits) - weight_EOI
    relative_error_E = error_EOI.square().sum((1, 2)) / weight_EOI.square().sum((1, 2))
    none_E = torch.zeros(len(weight_EOI), dtype=torch.int64)
    return Solution(codes_EOI, qparams.scale_EOG, None, relative_error_E.double(), none_E, none_E.bool())


class AbsMax(Callback):
    """The callback: give every weight of the current pass to the function above.

    Args:
        shrink: Factor on the range of every group.
    """

    def __init__(self, shrink: float = 1.0) -> None:
        self.shrink = shrink

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)

        def solver(unit: Unit, weight_EOI: Tensor) -> Solution:
            return absmax(weight_EOI, unit.grid, pl_module.model.dtype, self.shrink)

        if pl_module.current_pass.kind == "calibrate":
            quantize_sites(pl_module.adapter, pl_module.run, pl_module.current_pass.sites, solver)
