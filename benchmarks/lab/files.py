"""Quantize the bundled model and keep what it exports for a runtime."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.lab.study import MODEL
from benchmarks.lab.trial import fit
from callbacks.export import Export


class Keep(Callback):
    """Moves a format's folder out of the run's, which does not last; stands after ``Export``."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shutil.move(Path(trainer.default_root_dir) / self.name, self.folder / self.name)


def fit_file(ids_NL: Tensor, steps: Sequence[Callback], name: str, folder: Path, **settings: Any) -> Path:
    """Folder of a format of the bundled model, quantized by some steps.

    Args:
        ids_NL: Calibration ids.
        steps: Callbacks before the export.
        name: Of the format.
        folder: Gets the format's folder.
        settings: Of ``MoEQuantModule``.
    """
    keep = Keep(name, folder)
    fit(ids_NL, [*steps, Export(formats=["moeq", name]), keep], name=MODEL, **settings)
    return folder / name
