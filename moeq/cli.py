"""The command line: ``fit`` and ``validate`` over one module class and any datamodule."""

import inspect
import logging
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from typing_extensions import override

from moeq.disk.atomic import write_text
from moeq.module import MoEQuantModule
from moeq.progress import PassProgressBar

# Packages of the checkout, beside main.py, which imports them: their classes are known by their names alone.
PARTS = {"trainer.callbacks": ("callbacks", Callback), "data": ("datamodules", LightningDataModule)}


class RunFolderConfig(SaveConfigCallback):
    """The resolved configuration as config.yaml (validate: config_validate.yaml) at the top of the run folder."""

    affects_weights = False

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else "config_validate.yaml"
        write_text(Path(trainer.default_root_dir) / name, self.parser.dump(self.config, skip_none=False))


class MoEQuantCLI(LightningCLI):
    """LightningCLI with the two commands of moeq."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        both = LightningCLI.subcommands()
        return {"fit": both["fit"], "validate": both["validate"]}

    def before_validate(self) -> None:
        """Leave out Lightning's table of validation metrics: the callback Results prints a better one."""
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


def first_mistake(error: Exception) -> str:
    """What the user got wrong, out of an error of the parser, which lists every type that a value might have had."""
    text = str(error)
    if wrong := _wrong_class(text):
        return wrong
    if "Union subtypes" not in text:
        return text
    # Types within types: the innermost list has what was wrong, the first of its items what the user probably meant.
    *outer, errors = text.split("Errors:\n")
    items = re.findall(r"^\s*- (.+?)(?=^\s*- |\Z)", errors, re.DOTALL | re.MULTILINE)
    keys = re.findall(r'Parser key "([^"]+)"', "".join(outer))
    # Older versions of jsonargparse name first what the value was not meant to be: nothing at all.
    items = [item for item in items if "Expected a <class 'NoneType'>" not in item] or items
    mistake = " ".join(items[0].split()) if items else text
    if unknown := re.search(r"given class_path '([^']+)':.*(Option '.+' is not accepted)", text, re.DOTALL):
        option, short = keys[0] if keys else "data", unknown[1].rpartition(".")[2]
        name = short if short in known_parts(option) else unknown[1]
        return f"{'.'.join(keys) or option}: {unknown[2]}; --{option}.help {name} lists its options"
    if value := re.match(r"Problem with given class_path '[^']+': Parser key \"([^\"]+)\": (.+)", mistake):
        keys, mistake = [*keys, value[1]], value[2]
    return f"{'.'.join(keys)}: {mistake}" if keys else mistake


def _wrong_class(text: str) -> str | None:
    """A class that does not exist, with those of a similar name and all others; None where the error is another."""
    option = re.search(r'Parser key "([^"]+)"|--([\w.]+)\.help: ', text)
    missing = re.search(
        r"Expected a dot import path string: (?P<name>\S+)|(?:given class_path '(?P<path>[^']+)'|\.help):\s+"
        r"(?P<reason>module '[^']+' has no attribute '(?P<last>[^']+)'|No module named '[^']+')",
        text,
    )
    if not option or not missing:
        return None
    given, reason, known = missing["name"] or missing["path"], missing["reason"], known_parts(option[1] or option[2])
    what = " ".join(["there is no class", *([given] if given else []), *([f"({reason})"] if reason else [])])
    near = close_names(given.rpartition(".")[2] if given else missing["last"] or "", known)
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    listed = f"known by name are {', '.join(known)}; any other class is" if known else "write it as"
    return f"{option[1] or option[2]}: {what}; {remedy}{listed} package.module.Class"


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
