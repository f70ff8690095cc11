"""Quantize a model of the studies, keep what it exports for a runtime, and measure its size."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.lab.study import MODEL
from benchmarks.lab.trial import fit
from callbacks.export import Export
from moeq.disk.folder import weight_files
from moeq.disk.tensor_file import stored_tensors

# What a report says of the model with a label; the second is not in the repository.
MODELS = {
    "reference": "the bundled model",
    "Mixtral": (
        "a model of Mixtral's layout (4 blocks of 8 experts, hidden size 256), trained by the recipe of the bundled "
        "one for 1,500 steps (make mixtral-model)"
    ),
}


class Keep(Callback):
    """Moves a format's folder out of the run's, which does not last; stands after ``Export``."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shutil.move(Path(trainer.default_root_dir) / self.name, self.folder / self.name)


def fit_file(
    ids_NL: Tensor, steps: Sequence[Callback], name: str, folder: Path, model: str = MODEL, **settings: Any
) -> Path:
    """Folder of a format of a model, quantized by some steps.

    Args:
        ids_NL: Calibration ids.
        steps: Callbacks before the export.
        name: Of the format.
        folder: Gets the format's folder.
        model: Folder of the original.
        settings: Of ``MoEQuantModule``.
    """
    keep = Keep(name, folder)
    fit(ids_NL, [*steps, Export(formats=["moeq", name]), keep], name=model, **settings)
    return folder / name


def tensor_bytes(folder: Path) -> int:
    """Of all tensors of a folder; headers and the other files are left out."""
    stored = [tensor for path in weight_files(folder) for tensor in stored_tensors(path).values()]
    return sum(tensor.num_bytes for tensor in stored)
