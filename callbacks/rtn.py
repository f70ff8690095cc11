"""Round every weight to the nearest point of its grid: the baseline, and the smallest example of a method."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeq.fit.solve import Unit, quantize_sites
from moeq.module import MoEQuantModule
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution


class RTN(Callback):
    """Round-to-nearest; uses no calibration data."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the sites of this pass."""
        assert isinstance(pl_module, MoEQuantModule)

        def solver(unit: Unit, weight_EOI: Tensor) -> Solution:
            return round_to_nearest(weight_EOI, unit.grid, pl_module.adapter.storage_dtype)

        if pl_module.current_pass.kind == "calibrate":
            quantize_sites(pl_module.adapter, pl_module.run, pl_module.current_pass.sites, solver)
