"""The command line: ``fit`` and ``validate`` over one module class and any datamodule."""

import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from typing_extensions import override

from moeq.module import MoEQuantModule
from moeq.progress import PassProgressBar


class RunFolderConfig(SaveConfigCallback):
    """The resolved configuration as config.yaml (validate: config_validate.yaml) at the top of the run folder."""

    affects_weights = False

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ("config.yaml" if stage == "fit" else "config_validate.yaml")
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class MoEQuantCLI(LightningCLI):
    """LightningCLI with the two commands of moeq."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        both = LightningCLI.subcommands()
        return {"fit": both["fit"], "validate": both["validate"]}

    def before_validate(self) -> None:
        """Leave out Lightning's table of validation metrics: callbacks.Results prints a better one."""
        self.config_init["validate"]["verbose"] = False
        if not hasattr(self.datamodule, "evaluations"):
            raise ValueError(
                f"validate needs evaluation tasks, and {type(self.datamodule).__name__} has calibration data only; "
                "take configs/eval.yaml, with --model.name the folder of an export"
            )
        if self.trainer.limit_val_batches == 0:
            raise ValueError("limit_val_batches (0) evaluates nothing; leave it out for everything")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add moeq's progress bar, unless progress bars are off."""
        settings = self._get(self.config_init, "trainer", default={})
        bars = [PassProgressBar()] if settings.get("enable_progress_bar") is not False else []
        return super().instantiate_trainer(callbacks=[*(settings.get("callbacks") or []), *bars], **kwargs)

    @classmethod
    def run(cls, args: ArgsType = None) -> "MoEQuantCLI":
        """Parse and run one command."""
        # An advertisement for another product, in the first lines of every run.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
            lambda r: "litlogger" not in r.getMessage()
        )
        with warnings.catch_warnings():
            # Lightning advises on data-loader workers and optimizers; nothing here has either.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*configure_optimizers.*returned `None`.*")
            # Evaluation is a command of its own, with data of its own.
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            # All ranks log the same: what the metrics have reduced already.
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            # main(args) is also called from programs that have arguments of their own.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            try:
                return cls(
                    MoEQuantModule, LightningDataModule, subclass_mode_data=True, auto_configure_optimizers=False,
                    seed_everything_default=0, args=args, save_config_callback=RunFolderConfig,
                    save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
                    trainer_defaults=_trainer_defaults(), parser_kwargs=_parser_kwargs(cls.subcommands()),
                )  # fmt: skip
            except MisconfigurationException as error:  # of Lightning's, about an option of the Trainer
                raise ValueError(str(error)) from error


def first_mistake(error: Exception) -> str:
    """What the user got wrong, out of an error of the parser, which lists every type that a value might have had."""
    text = str(error)
    if "Union subtypes" not in text:
        return text
    # Types within types: the innermost list has what was wrong, the first of its items what the user probably meant.
    *outer, errors = text.split("Errors:\n")
    items = re.findall(r"^\s*- (.+?)(?=^\s*- |\Z)", errors, re.DOTALL | re.MULTILINE)
    keys = re.findall(r'Parser key "([^"]+)"', "".join(outer))
    mistake = " ".join(items[0].split()) if items else text
    if unknown := re.search(r"given class_path '([^']+)':.*(Option '.+' is not accepted)", text, re.DOTALL):
        return f"{'.'.join(keys) or 'data'}: {unknown[2]}; --data.help {unknown[1]} lists its options"
    return f"{'.'.join(keys)}: {mistake}" if keys else mistake


def _parser_kwargs(commands: Iterable[str]) -> dict[str, Any]:
    """No abbreviations (--model.bit is a typo), and errors that are raised rather than printed below the usage."""
    strict = {"allow_abbrev": False, "exit_on_error": False}
    return {**strict, **{command: strict for command in commands}}


def _trainer_defaults() -> dict[str, Any]:
    return {
        "max_epochs": -1, "accelerator": "auto", "devices": 1, "use_distributed_sampler": False,
        "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "default_root_dir": "runs/moeq",
    }  # fmt: skip
