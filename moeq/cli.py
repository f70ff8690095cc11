"""The command line: ``fit`` and ``validate`` over one module class and any datamodule."""

import inspect
import logging
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import fill
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from moeq.module import MoEQuantModule
from moeq.progress import PassProgressBar
from moeq.run_folder import RunFolder, RunLogger
from moeq.trainer_options import default_device, is_alone, refuse_options

# Packages of the checkout, beside main.py, which imports them: their classes are known by their names alone.
PARTS = {"trainer.callbacks": ("callbacks", Callback), "data": ("datamodules", LightningDataModule)}


class MoEQuantCLI(LightningCLI):
    """LightningCLI with the two commands of moeq."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        both = LightningCLI.subcommands()
        return {"fit": both["fit"], "validate": both["validate"]}

    def before_fit(self) -> None:
        """Refuse a checkpoint of Lightning: a run continues from its folder by itself."""
        self._refuse_checkpoint()

    def _refuse_checkpoint(self) -> None:
        given = self._get(self.config_init, "ckpt_path")
        if given is not None:
            raise ValueError(
                f"--ckpt_path {given} cannot be honoured: models are given by --model.name, and a run continues by "
                "itself in its folder (--trainer.default_root_dir)"
            )

    def before_validate(self) -> None:
        """Leave out Lightning's table of validation metrics: the callback Results prints a better one."""
        self.config_init["validate"]["verbose"] = False
        self._refuse_checkpoint()
        if not hasattr(self.datamodule, "evaluations"):
            raise ValueError(
                f"validate needs evaluation tasks, and {type(self.datamodule).__name__} has calibration data only; "
                "take configs/eval.yaml, with --model.name the folder of an export"
            )
        if self.trainer.limit_val_batches == 0:
            raise ValueError("limit_val_batches (0) evaluates nothing; leave it out for everything")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Refuse what would change numbers unseen, and add moeq's progress bar and TensorBoard's files."""
        settings = self._get(self.config_init, "trainer", default={})
        refuse_options(str(self.subcommand), settings)
        bars = [PassProgressBar()] if settings.get("enable_progress_bar") is not False else []
        own: dict[str, Any] = {"callbacks": [*(settings.get("callbacks") or []), *bars]}
        if settings.get("logger") in (None, True) and not settings.get("barebones"):
            own["logger"] = RunLogger(settings["default_root_dir"])
        if is_alone(settings):
            # Lightning would believe the variables of a batch system, which may tell of other processes.
            own["plugins"], rank_zero_only.rank = LightningEnvironment(), 0  # type: ignore[attr-defined]
        own["accelerator"], fallback = default_device(settings["accelerator"])
        if fallback is not None:
            self.model.run.fallbacks.append(fallback)
            rank_zero_info(f"Accelerator: {fallback.detail}")
        try:
            return super().instantiate_trainer(**own, **kwargs)
        except RuntimeError as error:  # of a batch system's variables, or a device that is not there
            raise ValueError(f"{error} (of Lightning's Trainer, about --trainer.*)") from error

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
                    seed_everything_default=0, args=args, save_config_callback=RunFolder,
                    save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
                    trainer_defaults=_trainer_defaults(), parser_kwargs=_parser_kwargs(cls.subcommands()),
                )  # fmt: skip
            except MisconfigurationException as error:  # of Lightning's, about an option of the Trainer
                raise ValueError(str(error)) from error


def known_parts(option: str) -> dict[str, type]:
    """Classes of the checkout that an option takes, by the name that is their class_path; none where it has no such.

    Args:
        option: "trainer.callbacks" or "data".
    """
    found: dict[str, type] = {}
    package, base = PARTS.get(option, ("", None))
    waiting: list[type[Any]] = [] if base is None else [base]
    while waiting:
        for each in waiting.pop().__subclasses__():
            waiting.append(each)
            if each.__module__.startswith(f"{package}.") and not inspect.isabstract(each):
                found[each.__name__] = each
    return dict(sorted(found.items()))


def parts_table() -> str:
    """Callbacks and datamodules with the first sentence of each, and how to see the options of one."""
    lines = []
    for option, (package, _) in PARTS.items():
        known = known_parts(option)
        lines += (
            ["", f"{package} (class_path of --{option}; --{option}.help NAME lists the options of one):"]
            if known
            else []
        )
        for name, part in known.items():
            sentence = re.split(r"(?<=\.)\s", " ".join((part.__doc__ or "").replace("``", "").split()))[0]
            lines.append(fill(sentence, 119, initial_indent=f"  {name:<22}", subsequent_indent=24 * " "))
    return "\n".join(lines)


def close_names(given: str, known: Iterable[str]) -> list[str]:
    """Names that contain a name, or else are spelt like it, whatever the case of letters."""
    by_lower = {name.lower(): name for name in known}
    inside = [name for lower, name in by_lower.items() if given and given.lower() in lower]
    return inside or [by_lower[lower] for lower in get_close_matches(given.lower(), by_lower)]


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help of the parser that leaves the lines of a description as they are."""


def _parser_kwargs(commands: Iterable[str]) -> dict[str, Any]:
    """No abbreviations (--model.bit is a typo), and errors that are raised rather than printed below the usage."""
    strict = {"allow_abbrev": False, "exit_on_error": False, "formatter_class": _HelpFormatter}
    return {**strict, **{command: {**strict, "description": parts_table()} for command in commands}}


def _trainer_defaults() -> dict[str, Any]:
    return {
        "max_epochs": -1, "accelerator": "auto", "devices": 1, "use_distributed_sampler": False,
        "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "default_root_dir": "runs/moeq",
    }  # fmt: skip
