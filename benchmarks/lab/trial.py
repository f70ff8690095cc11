"""Many quantizations of one model in one process, for studies: a fit without an export.

Runs the callbacks of ``main.py fit`` (calibration and GPTQ) on given token ids.  Weights are those that an export would
hold: codes and scales are dequantized in the model's dtype before the next block is calibrated.

Legend: N windows, L tokens of a window.
"""

import logging
import warnings
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from datamodules.calibration import CalibrationDataModule
from moeq.fit.solve import Unit
from moeq.module import MoEQuantModule
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams, choose_qparams
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec

BATCH = 8


class CachedGridGPTQ(GPTQ):
    """GPTQ that searches the clipping ranges of a weight once per width: they depend on the weight alone."""

    affects_weights = False
    _cache: ClassVar[dict[tuple[str, str, GridSpec, float], QParams]] = {}

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        if unit.grid.is_named:  # chosen by the Hessian, too, or fitted to the codes
            return super().solve(module, unit, weight_EOI, hessian_EII)
        scales, zero_points = [], []
        model, dtype = str(module.hparams["name"]), module.adapter.storage_dtype
        for position, expert in enumerate(unit.experts):
            start, rows = 0, []
            for leaf in unit.leaves:
                stop = start + unit.site.rows[leaf]
                one_EOI = weight_EOI[position : position + 1, start:stop]
                # A rotated model has weights of its own under the same names.
                mark = float(one_EOI.sum(dtype=torch.float64))
                key = model, unit.site.weight_name(expert, unit.site.leaves[leaf]), unit.grid, mark
                if key not in self._cache:
                    self._cache[key] = choose_qparams(one_EOI, unit.grid, dtype)
                rows.append(self._cache[key])
                start = stop
            scales.append(torch.cat([part.scale_EOG for part in rows], 1))
            if not unit.grid.symmetric:
                zeros = [part.zero_point_EOG for part in rows if part.zero_point_EOG is not None]
                zero_points.append(torch.cat(zeros, 1))
        known = QParams(torch.cat(scales), torch.cat(zero_points) if zero_points else None)
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, dtype, qparams=known)


class GivenIds(CalibrationDataModule):
    """Calibration on ids that exist already."""

    def __init__(self, ids_NL: Tensor) -> None:
        super().__init__(BATCH)
        self._given_NL = ids_NL

    def make_ids(self) -> Tensor:
        return self._given_NL


def fit(ids_NL: Tensor, callbacks: Sequence[pl.Callback] | None = None, **settings: Any) -> MoEQuantModule:
    """Quantize a model that is loaded anew.

    Args:
        ids_NL: Calibration ids.
        callbacks: Steps in their order; None is uniform bits, Hessians, GPTQ.
        settings: Of ``MoEQuantModule``: name, bits, group_size, affinity_power, ...
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    steps = [BitAllocation(), HessianCalibration(), CachedGridGPTQ()] if callbacks is None else list(callbacks)
    # Studies stay at the damping of the papers where an arm does not say otherwise.
    module = MoEQuantModule(**{"damping": 0.01, **settings})
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # Few workers, no logger: advice for training runs.
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=steps,
        )  # fmt: skip
        trainer.fit(module, datamodule=GivenIds(ids_NL))
    return module
