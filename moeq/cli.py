"""The command line: ``fit`` and ``validate`` over one module class and any datamodule."""

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningCLI
from typing_extensions import override

from moeq.module import MoEQuantModule


class MoEQuantCLI(LightningCLI):
    """LightningCLI with the two commands of moeq."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}, "validate": {"model", "dataloaders", "datamodule"}}

    @classmethod
    def run(cls, args: ArgsType = None) -> "MoEQuantCLI":
        """Parse and run one command."""
        with warnings.catch_warnings():
            # Lightning advises on data-loader workers and optimizers; nothing here has either.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*configure_optimizers.*returned `None`.*")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            return cls(
                MoEQuantModule, LightningDataModule, subclass_mode_data=True, auto_configure_optimizers=False,
                seed_everything_default=0, args=args, save_config_kwargs={"overwrite": True},
                trainer_defaults=_trainer_defaults(), parser_kwargs={"description": "moeq"},
            )  # fmt: skip


def _trainer_defaults() -> dict[str, Any]:
    return {
        "max_epochs": -1, "accelerator": "auto", "devices": 1, "use_distributed_sampler": False,
        "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "default_root_dir": "runs/moeq",
    }  # fmt: skip
