"""Both commands say before any work what they are going to take, and afterwards what they took."""

import csv
import json
from pathlib import Path

import pytest
import torch

import moeq.forecast_validation
from main import main
from tests.evaluation_data import write_evaluation_data
from tests.test_main import QUIET, validate
from tests.tiny import save_tiny

CONFIG = Path("configs/eval.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("preflight") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("preflight") / "data")


def options(data: Path, *more: str) -> list[str]:
    return [
        "--data.tasks=[arc_easy]", "--data.domains={prose: wikitext2_test.txt}", "--data.window_length=64",
        "--data.num_windows=6", f"--data.data_dir={data}", "--data.num_documents=6", "--model.reference=null", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_validate_puts_what_each_task_took_beside_what_was_expected(
    placement: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callbacks.results.draw", lambda *_: None)
    monkeypatch.setattr(moeq.forecast_validation, "LARGE_MODEL", 0)
    validate(CONFIG, model, tmp_path, *options(data, f"--model.placement={placement}"))
    forecast = json.loads((tmp_path / "preflight_validate.json").read_text())
    assert [phase["kind"] for phase in forecast["phases"]] == ["load model", "task prose", "task arc_easy"]
    assert all(phase["seconds"] for phase in forecast["phases"][1:])
    with (tmp_path / "memory_validate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["load model", "task prose", "task arc_easy"]
    assert all(int(row["host_expected"]) > 0 and int(row["host_measured"]) > 0 for row in rows)


def test_a_preflight_of_validate_stops_before_a_model_is_opened(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("moeq.evaluation.open_models.load_model", no_model)
    command = ["validate", f"--config={CONFIG}", f"--model.name={model}", f"--trainer.default_root_dir={tmp_path}"]
    reference = f"--model.reference={model}"
    with pytest.raises(SystemExit) as stopped:
        main([*command, *QUIET, *options(data), reference, "--model.reference_mode=disk", "--model.preflight=true"])
    assert stopped.value.code == 0
    table = (tmp_path / "preflight_validate.md").read_text()
    assert "| original " in table
    assert "| task prose " in table
