"""A progress bar that says which block and which stage a pass is at, or which document of which task validate is at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from moeq.module import MoEQuantModule

# Documents and cost of one batch; costs are in any unit that time is proportional to, such as tokens.
BatchCost = tuple[int, float]


@dataclass(frozen=True)
class EvaluationPosition:
    """Where an evaluation is.

    Time is estimated from costs: documents are sorted from long to short, so that half of them take more than half of
    the time.

    Attributes:
        batches: Of each task those that this rank runs.
    """

    batches: Sequence[Sequence[BatchCost]]

    @property
    def total(self) -> float:
        """Cost of everything."""
        return sum(cost for task in self.batches for _, cost in task)

    def done(self, task: int, num_batches: int) -> float:
        """Cost of the tasks before ``task`` and of the first batches of it."""
        before = sum(cost for earlier in self.batches[:task] for _, cost in earlier)
        return before + sum(cost for _, cost in self.batches[task][:num_batches])

    def label(self, name: str, task: int, num_batches: int) -> str:
        """Such as "hellaswag 1200/10042 documents"."""
        documents = [count for count, _ in self.batches[task]]
        return f"{name} {sum(documents[:num_batches])}/{sum(documents)} documents"


class PassProgressBar(TQDMProgressBar):
    """Lightning's bar, with "block 2 mlp_in (11/16)" in place of an epoch number.

    In validate it is one bar over all documents of all tasks, where the datamodule has ``batch_costs``: a
    ``BatchCost`` for each batch of each of its loaders, those of this rank.  Several ranks show the first one's share.
    """

    affects_weights = False
    EVALUATION_FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}]"

    def __init__(self) -> None:
        super().__init__()
        self._position: EvaluationPosition | None = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        assert isinstance(pl_module, MoEQuantModule)
        position = f"({trainer.current_epoch + 1}/{len(pl_module.walk.schedule)})"
        self.train_progress_bar.set_description(f"{pl_module.current_pass.label} {position}")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        costs = getattr(trainer.datamodule, "batch_costs", None)  # type: ignore[attr-defined]
        self._position = None
        if costs is not None:
            # limit_val_batches leaves out the last ones.
            kept = [each[: int(min(n, len(each)))] for each, n in zip(costs, trainer.num_val_batches, strict=True)]
            self._position = EvaluationPosition(kept)
            self.val_progress_bar.bar_format = self.EVALUATION_FORMAT
            self.val_progress_bar.reset(self._position.total)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._position is None:
            super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        elif batch_idx == 0:
            self._show(pl_module, dataloader_idx, 0)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._position is None:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        elif self._should_update(batch_idx + 1, len(self._position.batches[dataloader_idx])):
            self._show(pl_module, dataloader_idx, batch_idx + 1)

    def _show(self, module: LightningModule, task: int, num_batches: int) -> None:
        assert isinstance(module, MoEQuantModule)
        assert self._position is not None
        bar = self.val_progress_bar
        if not bar.disable:
            # Set, not added to: tqdm then estimates from the whole time so far, which a task of its own speed needs.
            bar.n = self._position.done(task, num_batches)
            bar.set_description(self._position.label(module.evaluations[task].task.name, task, num_batches))
