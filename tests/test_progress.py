"""One bar over all documents of all tasks, with the time left from what batches cost."""

import io
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from moeq.module import MoEQuantModule
from moeq.progress import EvaluationPosition, PassProgressBar

COSTS = [[(1, 900.0), (2, 60.0), (3, 40.0)], [(4, 1000.0)]]


class Data(L.LightningDataModule):
    def val_dataloader(self) -> list[Any]:
        return [DataLoader(torch.arange(3), batch_size=1), DataLoader(torch.arange(1), batch_size=1)]


class DataWithCosts(Data):
    batch_costs = COSTS


class Module(MoEQuantModule):
    evaluations = [SimpleNamespace(task=SimpleNamespace(name=name)) for name in ("hellaswag", "mmlu")]  # noqa: RUF012

    def configure_model(self) -> None:
        """No model."""

    def on_validation_start(self) -> None:
        """No model."""

    def on_validation_epoch_end(self) -> None:
        """No metrics."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing."""


def shown(data: Data, **options: Any) -> tuple[list[tuple[float, str]], Any]:
    """What the bar showed, as (n, description), and the bar."""
    states: list[tuple[float, str]] = []

    class Watch(L.Callback):
        """After the bar's hook, as bars come last but checkpoints."""

        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            states.append((bar.val_progress_bar.n, getattr(bar.val_progress_bar, "desc", "hidden")))

    bar = PassProgressBar()
    trainer = L.Trainer(
        callbacks=[bar, Watch()], logger=False, enable_checkpointing=False, enable_model_summary=False,
        accelerator="cpu", **options,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        trainer.validate(Module(), data, verbose=False)
    return states, bar.val_progress_bar


def test_the_bar_counts_documents_and_advances_by_what_they_cost() -> None:
    states, bar = shown(DataWithCosts())
    assert states == [
        (900, "hellaswag 1/6 documents: "), (960, "hellaswag 3/6 documents: "), (1000, "hellaswag 6/6 documents: "),
        (2000, "mmlu 4/4 documents: "),
    ]  # fmt: skip
    assert bar.total == 2000


def test_the_time_left_is_that_of_the_costs_left() -> None:
    _, bar = shown(DataWithCosts())
    meter = bar.format_meter(**{**bar.format_dict, "n": 900, "elapsed": 90.0, "ncols": 80})
    # 1100 of 2000 at ten per second; by batches it would be three times 90 seconds.
    assert "01:30<01:50" in meter


def test_limited_batches_are_not_waited_for() -> None:
    states, bar = shown(DataWithCosts(), limit_val_batches=2)
    assert [label for _, label in states] == [
        "hellaswag 1/3 documents: ", "hellaswag 3/3 documents: ", "mmlu 4/4 documents: "
    ]  # fmt: skip
    assert bar.n == bar.total == 1960


def test_a_datamodule_without_costs_has_the_bars_of_lightning() -> None:
    states, _ = shown(Data())
    assert states[-1] == (1, "Validation DataLoader 1: ")


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda _: False))
    states, bar = shown(DataWithCosts())
    assert bar.disable
    assert states == [(0, "hidden")] * 4


def test_positions_of_tasks_add_up() -> None:
    position = EvaluationPosition(COSTS)
    assert position.total == position.done(1, 1) == 2000
    assert position.done(1, 0) == position.done(0, 3) == 1000
    assert position.label("mmlu", 1, 0) == "mmlu 0/4 documents"
