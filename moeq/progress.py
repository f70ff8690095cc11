"""A progress bar that says which block and which stage a pass is at."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from moeq.module import MoEQuantModule


class PassProgressBar(TQDMProgressBar):
    """Lightning's bar, with "block 2 mlp_in (11/16)" in place of an epoch number."""

    affects_weights = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        assert isinstance(pl_module, MoEQuantModule)
        position = f"({trainer.current_epoch + 1}/{len(pl_module.schedule)})"
        self.train_progress_bar.set_description(f"{pl_module.current_pass.label} {position}")
