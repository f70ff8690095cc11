"""A fit in this process on the small calibration data of the tests, without an export of its own or a progress bar."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch import Callback

from moeq.module import MoEQuantModule
from tests.fit.test_damaged_blocks import Own


def fit_own(steps: Sequence[Callback], model: Path, folder: Path, **settings: object) -> MoEQuantModule:
    """The module after a fit of the model by the steps, with ``settings`` of ``MoEQuantModule``."""
    module = MoEQuantModule(str(model), **settings)  # type: ignore[arg-type]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=list(steps), default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Own())
    return module
