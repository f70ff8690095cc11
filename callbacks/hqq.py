"""Round to nearest on ranges that ignore what fits badly (HQQ): no calibration data."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.fit.solve import Unit, quantize_sites
from moeq.module import MoEQuantModule
from moeq.quant.hqq import half_quadratic
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution


class HQQ(Callback):
    """Half-quadratic quantization; uses no calibration data.

    Args:
        norm: Exponent of the error that is minimised, above 0 and at most 1.
    """

    def __init__(self, norm: float = 0.7) -> None:
        self.norm = norm

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)

        def solver(unit: Unit, weight_EOI: Tensor) -> Solution:
            qparams = half_quadratic(weight_EOI, unit.grid, pl_module.adapter.storage_dtype, self.norm)
            return round_to_nearest(weight_EOI, unit.grid, pl_module.adapter.storage_dtype, qparams=qparams)

        if pl_module.current_pass.kind == "calibrate":
            quantize_sites(pl_module.adapter, pl_module.run, pl_module.current_pass.sites, solver)
