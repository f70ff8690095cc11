"""The run folder as the command line keeps it: locked for one run, and as it was until nothing refuses the run."""

from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from moeq.callback import Step, module_of
from moeq.disk.atomic import write_text
from moeq.disk.lock import FolderLock
from moeq.module import MoEQuantModule
from moeq.quant.spec import Fallback


class RunFolder(SaveConfigCallback, Step):
    """Holds the lock of the run folder, and writes the resolved configuration into it once the run is accepted.

    It is config.yaml for fit and config_validate.yaml for validate.  The first rank does both.
    """

    affects_weights = False
    _lock: FolderLock | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that another run is working in."""
        if not trainer.is_global_zero or self._lock is not None:
            return
        self._lock = FolderLock(Path(trainer.default_root_dir))
        if self._lock.unknown:
            detail = f"the file system has no locks ({self._lock.unknown}): a second run here would not be noticed"
            module_of(pl_module).run.fallbacks.append(Fallback("run folder", "not locked", detail))
            rank_zero_info(f"Run folder not locked: {detail}")

    @override
    def begin(self, module: MoEQuantModule) -> None:
        self._accept(module.trainer, module, "fit")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The models are there."""
        if trainer.state.fn == "validate":
            self._accept(trainer, pl_module, "validate")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run has ended."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has ended, too."""
        self._release()

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else "config_validate.yaml"
        write_text(Path(trainer.default_root_dir) / name, self.parser.dump(self.config, skip_none=False))

    def _accept(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.open()
        if trainer.is_global_zero:
            self.save_config(trainer, module, stage)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class RunLogger(TensorBoardLogger):
    """TensorBoard's files in a run folder, from ``open`` or the first number on: a refused run leaves none.

    Lightning asks every logger for its files before anything is looked at; until then they are a stand-in.
    """

    _opened = False
    _told: tuple[Any, ...] = ()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the files; before they are there, one that forgets what it gets."""
        return super().experiment if self._opened else _Nothing()

    @rank_zero_only
    def open(self) -> None:
        """Begin the files."""
        if not self._opened:
            self._opened = True
            if self._told:
                super().log_hyperparams(*self._told)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        self._told = params, metrics, step
        if self._opened:
            super().log_hyperparams(*self._told)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.open()
        super().log_metrics(metrics, step)

    @override
    @rank_zero_only
    def save(self) -> None:
        if self._opened:
            super().save()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._opened:
            super().finalize(status)


class _Nothing:
    """Takes every call."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
