"""A small datamodule that knows nothing of moeq, and a fit in this process on it, without a progress bar."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from moeq.module import MoEQuantModule


class Own(L.LightningDataModule):
    """A datamodule that knows nothing of moeq.

    Args:
        seed: Of the ids.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        ids_NL = torch.randint(0, 264, (4, 24), generator=generator)
        return DataLoader([{"input_ids": ids_L} for ids_L in ids_NL], batch_size=2)  # type: ignore[arg-type]


def fit_own(steps: Sequence[Callback], model: Path, folder: Path, **settings: object) -> MoEQuantModule:
    """The module after a fit of the model by the steps, with ``settings`` of ``MoEQuantModule``."""
    module = MoEQuantModule(str(model), **settings)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=list(steps), default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Own())
    return module
