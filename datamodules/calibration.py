"""What every source of calibration data shares: token ids, and batches divided over ranks without duplicates."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

from moeq.fit.memory import DataShape
from moeq.quant.spec import Fallback


class BatchShare(Sampler[list[int]]):
    """Batches rank, rank + world_size, ... of the batches that one rank alone would see, in their order.

    Lightning's own sampler would shuffle them and repeat some to make shares equal, and every sum of a calibration
    pass would count those twice.
    """

    def __init__(self, num_items: int, batch_size: int, rank: int, world_size: int) -> None:
        starts = range(0, num_items, batch_size)
        if len(starts) < world_size:
            raise ValueError(
                f"{num_items} sequences in batches of {batch_size} are {len(starts)} batches, fewer than the "
                f"{world_size} ranks; choose a batch_size of at most {max(1, num_items // world_size)}"
            )
        self._batches = [list(range(i, min(i + batch_size, num_items))) for i in starts[rank::world_size]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class CalibrationDataModule(L.LightningDataModule, ABC):
    """Train batches ``{"input_ids": [B, L]}`` from ``calibration_ids``."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be positive; the usual value is 8")
        self.batch_size = batch_size
        self._ids_NL: Tensor | None = None

    def calibration_ids(self) -> Tensor:
        """int64 [N, L] on the CPU, the same on every rank; made once, before any weight of the model is changed.

        Raises:
            ValueError: They cannot be made, or are fewer batches than ranks.
        """
        if self._ids_NL is None:
            ids_NL = self.make_ids()
            self._share(ids_NL)
            if num_equal := len(ids_NL) - len(ids_NL.unique(dim=0)):
                detail = f"{num_equal} of {len(ids_NL)} repeat another one: their tokens count several times"
                self._tell("calibration data", "equal sequences", detail)
            self._ids_NL = ids_NL
        return self._ids_NL

    def data_key(self) -> str:
        """What decides about data that take long to make, before they are made; empty where making them tells soon."""
        return ""

    def begin(self) -> None:
        """Write what describes the data, where anything does: the run is not refused any more."""

    @property
    def _module(self) -> Any:
        assert self.trainer is not None, "the data are made by a Trainer"
        return self.trainer.lightning_module

    def _tell(self, source: str, reason: str, detail: str) -> None:
        """Something about the data that a user would want otherwise: on the screen, and in the report of the run."""
        self._module.run.fallbacks.append(Fallback(source, reason, detail))
        rank_zero_info(f"Calibration data: {reason}: {detail}")

    def shape(self) -> DataShape | None:
        """How many sequences of how many tokens there are going to be (at most); None where only making them tells.

        A run without it has no preflight.
        """
        return None

    @abstractmethod
    def make_ids(self) -> Tensor:
        """The sequences, int64 [N, L] on the CPU; called by every rank, from ``on_fit_start`` on."""

    @override
    def val_dataloader(self) -> list[Any]:
        """None: the tasks of validate have a datamodule of their own."""
        return []

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        ids_NL = self.calibration_ids()
        rows = [{"input_ids": ids_L} for ids_L in ids_NL]
        return DataLoader(rows, batch_sampler=self._share(ids_NL))  # type: ignore[arg-type]

    def _share(self, ids_NL: Sized) -> BatchShare:
        """Batches of this rank."""
        assert self.trainer is not None, "the data are made by a Trainer"
        return BatchShare(len(ids_NL), self.batch_size, self.trainer.global_rank, self.trainer.world_size)


def check_positions(config: Any, length: int) -> None:
    """Raise ValueError where sequences of ``length`` tokens are longer than a model's configuration allows."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length ({length}) must not exceed the {limit} positions of the model; choose {limit}")
