"""What every source of calibration data shares: token ids, and batches divided over ranks without duplicates."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

from moeq.fit.memory import DataShape


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
        """int64 [N, L] on the CPU, the same on every rank; made once, before any weight of the model is changed."""
        if self._ids_NL is None:
            self._ids_NL = self.make_ids()
        return self._ids_NL

    @property
    def _tokenizer(self) -> Any:
        assert self.trainer is not None, "the data are made by a Trainer"
        return self.trainer.lightning_module.tokenizer

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
        assert self.trainer is not None, "the loader is built by a Trainer"
        ids_NL = self.calibration_ids()
        share = BatchShare(len(ids_NL), self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader([{"input_ids": ids_L} for ids_L in ids_NL], batch_sampler=share)  # type: ignore[arg-type]


def check_positions(config: Any, length: int) -> None:
    """Raise ValueError where sequences of ``length`` tokens are longer than a model's configuration allows."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length ({length}) must not exceed the {limit} positions of the model; choose {limit}")
