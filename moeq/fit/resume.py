"""A killed ``fit`` continues after its last finished block.

Each finished block is one file in the run folder, with a fingerprint of what it depends on: the configuration, the
model and the calibration data.  A restarted run with the same fingerprint loads those blocks and starts behind them.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moeq.disk.digest import digest, model_digest, tensor_digest
from moeq.fit.block_files import block_path, load_block, save_block
from moeq.fit.solve import change_parameters, commit
from moeq.models.adapter import Site
from moeq.models.storage import storage_dtype

if TYPE_CHECKING:
    from moeq.module import MoEQuantModule

# Settings that do not change what a block becomes; the dtype that is computed in counts by itself, as it was chosen.
NEUTRAL_SETTINGS = frozenset({"compute_dtype", "reference", "reference_mode", "restart", "label", "hessian_gib"})


class Resume:
    """Writes finished blocks of a run and finds them again.

    Args:
        module: The module whose run it is; its model, trainer and datamodule exist.
        sites: Sites of every block.
    """

    def __init__(self, module: "MoEQuantModule", sites: Sequence[tuple[Site, ...]]) -> None:
        self.module, self.sites = module, sites
        self.fingerprint = run_fingerprint(module)
        self.first_block = 0

    def load(self) -> int:
        """Read the finished blocks into the run; returns the first block that is not finished."""
        folder, blocks = self.module.run_dir, self.module.run_dir / "blocks"
        if self.module.hparams["restart"] and blocks.exists() and self.module.global_rank == 0:
            shutil.rmtree(blocks)
        self.module.trainer.strategy.barrier("moeq_restart")
        while self.first_block < len(self.sites) and block_path(folder, self.first_block).exists():
            load_block(folder, self.first_block, self.module.run, self.fingerprint)
            self.first_block += 1
        return self.first_block

    def commit(self) -> None:
        """Write the weights of the finished blocks into the model."""
        adapter, run = self.module.adapter, self.module.run
        for sites in self.sites[: self.first_block]:
            commit(adapter, sites, run.quantized)
        change_parameters(adapter, run, dict(run.changed))

    def save(self, block: int) -> None:
        """Write a finished block (by the first rank), where its weights were quantized at all."""
        names = [name for site in self.sites[block] for name in site.weight_names()]
        if self.module.global_rank == 0 and all(name in self.module.run.quantized for name in names):
            prefix = f"{self.module.adapter.block_prefix}.{block}."
            changed = [name for name in self.module.run.changed if name.startswith(prefix)]
            save_block(self.module.run_dir, block, self.module.run, names, changed, self.fingerprint)


def run_fingerprint(module: "MoEQuantModule") -> dict[str, str]:
    """Digests of the configuration, the model and the calibration data of a run, and the dtype that it computes in.

    The configuration is that of the module, of what is fed to it, and of every callback that does not declare
    ``affects_weights = False``.
    """
    given = {key: value for key, value in module.hparams.items() if not key.startswith("_")}
    settings: dict[str, Any] = {key: value for key, value in given.items() if key not in NEUTRAL_SETTINGS}
    trainer: Any = module.trainer
    settings["batches"] = [trainer.limit_train_batches, getattr(trainer.datamodule, "batch_size", None)]
    for callback in trainer.callbacks:
        kind = type(callback)
        if not kind.__module__.startswith("lightning.") and getattr(kind, "affects_weights", True):
            settings[kind.__name__] = {k: v for k, v in vars(callback).items() if not k.startswith("_")}
    return {
        "configuration": digest(settings),
        "model": model_digest(module.model, partial(storage_dtype, module.model)),
        "compute dtype": str(module.model.dtype).removeprefix("torch."),
        "data": _data_digest(module),
    }


def _data_digest(module: "MoEQuantModule") -> str:
    datamodule = module.trainer.datamodule  # type: ignore[attr-defined]
    # A datamodule of the user's own may have no fixed set of ids; its configuration then stands for its data.
    ids = getattr(datamodule, "calibration_ids", None)
    return digest(type(datamodule).__name__) if ids is None else tensor_digest(ids())
