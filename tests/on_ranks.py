"""Data and callbacks of runs on several ranks: few tokens, many small units, and ends that nobody wants."""

import json
import os
import signal
from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.kronecker_factors import KroneckerFactors
from datamodules.calibration import CalibrationDataModule
from moeq.callback import HookedStep, module_of
from moeq.fit import share
from moeq.models.observe import observe_routing
from moeq.module import MoEQuantModule


class FewTokens(CalibrationDataModule):
    """Sequences of two tokens, each a batch of its own."""

    def __init__(self, num_sequences: int) -> None:
        super().__init__(batch_size=1)
        self.num_sequences = num_sequences

    def make_ids(self) -> Tensor:
        return torch.randint(1, 257, (self.num_sequences, 2), generator=torch.Generator().manual_seed(3))


class SmallUnits(Callback):
    """Every expert is a unit of its own."""

    affects_weights = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share.UNIT_OPERATIONS = 1


class GivenSequences(Callback):
    """Kronecker factors of five sequences that nobody has to write."""

    affects_weights = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ids_NT = torch.randint(1, 257, (5, 16), generator=torch.Generator().manual_seed(4))
        KroneckerFactors._write = lambda *_: ids_NT  # type: ignore[method-assign]


class ReachedExperts(HookedStep):
    """Which experts the tokens of each rank reach, as ``reached_N.json`` of rank N."""

    affects_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.reached: dict[str, list[int]] = {}

    def attach(self, module: MoEQuantModule, hooks: ExitStack) -> None:
        hooks.enter_context(observe_routing(module.adapter.expert_modules(), self._on_routing))

    def _on_routing(self, path: str, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self.reached[path] = sorted({*self.reached.get(path, []), *ids_TK.flatten().tolist()})

    def finish(self, module: MoEQuantModule) -> None:
        path = module.run_dir / f"reached_{module.global_rank}.json"
        path.write_text(json.dumps(self.reached))


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
