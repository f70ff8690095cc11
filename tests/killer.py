"""Callbacks that end the process as a power cut would."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moeq.module import MoEQuantModule
from moeq.sampling import parts


class KillAtBlock(Callback):
    """SIGKILL when the first pass of a block starts."""

    affects_weights = False

    def __init__(self, block: int) -> None:
        self.block = block

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        if pl_module.current_pass.block == self.block:
            os.kill(os.getpid(), signal.SIGKILL)


class KillBeforeName(Callback):
    """SIGKILL when a file or folder is written whole and about to get its name."""

    affects_weights = False

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        os.replace, os.rename = self._killing(os.replace), self._killing(os.rename)

    def _killing(self, rename: Any) -> Any:
        def killing(source: Any, target: Any) -> None:
            if os.path.basename(target) == self.name:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return killing


class KillWhileSampling(Callback):
    """SIGKILL when some parts of the calibration set are written."""

    affects_weights = False

    def __init__(self, num_parts: int) -> None:
        self.num_parts = num_parts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write, written = parts.save_sampled, []

        def save_sampled(*args: Any) -> None:
            write(*args)
            written.append(args)
            if len(written) == self.num_parts:
                os.kill(os.getpid(), signal.SIGKILL)

        parts.save_sampled = save_sampled


class KillWhileEvaluating(Callback):
    """SIGKILL when some batches of a task are evaluated."""

    affects_weights = False

    def __init__(self, task: int, num_batches: int) -> None:
        self.task, self.num_batches = task, num_batches

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if (dataloader_idx, batch_idx + 1) == (self.task, self.num_batches):
            os.kill(os.getpid(), signal.SIGKILL)
