"""The callback that writes what was evaluated, on stubs of a module and a trainer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.results import Results
from moeq.checkpoint.placement import Placement
from moeq.disk.identity import model_identity
from moeq.module import MoEQuantModule
from moeq.report.results import read_results
from moeq.report.task_report import Description, task_report
from moeq.report.task_tables import markdown_tasks
from moeq.tasks.documents import Result
from moeq.tasks.metrics import TaskMetrics
from moeq.tasks.task import MultipleChoice, Source
from tests.reports import description
from tests.tiny import save_tiny, tiny_model

GROUPS = (("stem", "physics"), ("humanities", "law"))


class Evaluation:
    """An evaluated task with two subjects."""

    def __init__(self) -> None:
        self.task = MultipleChoice(
            name="mmlu", source=Source("mmlu", None), context=str, choices=lambda _: (), answer=lambda _: 0
        )
        self.metrics = TaskMetrics("mmlu", {"acc": "mean"}, GROUPS)
        for index in range(20):
            self.metrics.add(Result(index, "", GROUPS[index % 2], {"acc": (float(index < 15), 1.0)}))

    def description(self) -> Description:
        return description(num_documents=20, partial="limit_val_batches", num_shots=5)


class Module(MoEQuantModule):
    """A module after validate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name=str(save_tiny("qwen2_moe", folder / "tiny")), label="original")
        self._models["model"] = tiny_model("qwen2_moe")
        self.folder = folder
        self.validation = SimpleNamespace(  # type: ignore[assignment]
            reports=[task_report(Evaluation())], placements={"model": Placement("memory", "it fits")}
        )

    @property
    def run_dir(self) -> Path:
        return self.folder


def validated(folder: Path, **changes: Any) -> list[Any]:
    loggers = [TensorBoardLogger(folder / "tensorboard"), CSVLogger(folder / "csv")]
    data = SimpleNamespace(hparams={"tasks": ["mmlu"], "data_dir": Path("data")})
    trainer = SimpleNamespace(
        is_global_zero=True, loggers=loggers, global_step=0, datamodule=data, limit_val_batches=1.0, world_size=1
    )
    vars(trainer).update(changes)
    Results().on_validation_end(trainer, Module(folder))  # type: ignore[arg-type]
    loggers[0].experiment.close()
    return loggers


def test_files_hold_what_was_measured_where_and_with_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr("callbacks.results.rank_zero_info", printed.append)
    validated(tmp_path)
    (row,) = read_results(tmp_path / "results.json")
    assert (row.method, row.accuracy, row.partial) == ("original", {"mmlu": 0.75}, True)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["tasks"][0]["metrics"]["acc"]["stderr"] == pytest.approx((0.75 * 0.25 / 19) ** 0.5)
    assert data["tasks"][0]["groups"]["law"]["acc"]["num_documents"] == 10
    assert data["model"]["digest"] == model_identity(str(tmp_path / "tiny"))
    assert data["model"]["placement"] == {"model": "memory"}
    assert data["settings"]["data"] == {"tasks": ["mmlu"], "data_dir": "data"}
    assert (data["settings"]["limit_val_batches"], data["dtype"], data["num_ranks"]) == (1.0, "float32", 1)
    assert {"torch", "transformers", "lightning", "datasets", "python", "platform"} <= set(data["versions"])
    assert "partial: 20 of 10042 (limit_val_batches)" in (tmp_path / "results.md").read_text()
    assert "| mmlu / stem" in printed[0]


def test_tensorboard_has_the_figures_and_the_table(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger, _ = validated(tmp_path)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"figures/tasks", "figures/mmlu_groups"}
    assert sorted(path.stem for path in tmp_path.glob("figures/*.png")) == ["mmlu_groups", "tasks"]
    (event,) = events.Tensors("tables/tasks/text_summary")
    (table,) = event.tensor_proto.string_val
    assert table.decode() == markdown_tasks([task_report(Evaluation())])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    validated(tmp_path, is_global_zero=False)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "figures").exists()
