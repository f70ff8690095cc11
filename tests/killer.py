"""A callback that ends the process as a power cut would."""

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer

from moeq.module import MoEQuantModule


class KillAtBlock(Callback):
    """SIGKILL when the first pass of a block starts."""

    affects_weights = False

    def __init__(self, block: int) -> None:
        self.block = block

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        if pl_module.current_pass.block == self.block:
            os.kill(os.getpid(), signal.SIGKILL)
