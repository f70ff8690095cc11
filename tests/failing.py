"""A callback that ends one of several ranks: by an error, or as the system does where memory runs out."""

import os
import signal

from lightning.pytorch import Callback, LightningModule, Trainer

from moeq.callback import module_of


class FailOnRank(Callback):
    """Fail on one rank at the end of the first pass of a block, while the others wait for its results.

    Args:
        rank: Which rank.
        block: At which block.
        how: "mistake" is an error that a user can mend, "bug" any other, "killed" SIGKILL.
    """

    affects_weights = False

    def __init__(self, rank: int, block: int = 1, how: str = "mistake") -> None:
        self.rank, self.block, self.how = rank, block, how

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        current = module_of(pl_module).current_pass
        if trainer.global_rank != self.rank or current.block != self.block:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        message = f"rank {self.rank} cannot go on; help it"
        raise ValueError(message) if self.how == "mistake" else RuntimeError(message)
