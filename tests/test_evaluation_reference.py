"""A model compared with its original, which is in memory or has left its logits on disk."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import moeq.evaluation.open_models
from tests.evaluation_data import write_evaluation_data
from tests.test_main import fit, validate
from tests.tiny import save_tiny

CONFIG = Path("configs/eval.yaml")
pytestmark = pytest.mark.slow
COMPARED = ("kl", "top1_agreement", "router_agreement")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("compared") / "original")


@pytest.fixture(scope="module")
def export(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    fit(Path("configs/rtn_w3.yaml"), original, folder)
    return folder / "export"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("compared") / "data")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model was loaded."""
    counts: Counter[str] = Counter()
    load = moeq.evaluation.open_models.load_model

    def counted(name: str, *args: Any, **more: Any) -> nn.Module:
        counts[name] += 1
        return load(name, *args, **more)

    monkeypatch.setattr(moeq.evaluation.open_models, "load_model", counted)
    return counts


def options(data: Path, original: Path, mode: str) -> list[str]:
    # Choices with a shared context, windows, whole pages and generation.
    return [
        "--data.tasks=[arc_easy,winogrande,wikitext,sums]", "--data.domains={prose: wikitext2_test.txt}",
        "--data.window_length=64", "--data.num_documents=4", f"--data.data_dir={data}", "--data.batch_tokens=1024",
        f"--model.reference={original}", f"--model.reference_mode={mode}",
    ]  # fmt: skip


def compared(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(task["task"], name): task["metrics"][name]["value"] for task in results["tasks"] for name in COMPARED}


def own(results: dict[str, Any]) -> dict[str, Any]:
    """The metrics of the tasks themselves."""
    return {
        task["task"]: {name: found for name, found in task["metrics"].items() if name not in COMPARED}
        for task in results["tasks"]
    }


def test_an_export_differs_equally_from_the_original_in_memory_and_on_disk(
    original: Path, export: Path, data: Path, tmp_path: Path, loaded: Counter[str]
) -> None:
    memory = validate(CONFIG, export, tmp_path / "memory", *options(data, original, "memory"))
    disk = validate(CONFIG, export, tmp_path / "disk", *options(data, original, "disk"))
    assert loaded == {str(export): 2, str(original): 2}
    assert len(compared(memory)) == 5 * len(COMPARED)
    for (task, metric), value in compared(memory).items():
        assert compared(disk)[task, metric] == pytest.approx(value, rel=1e-6), (task, metric)
        assert value > 0 if metric == "kl" else 0 < value < 1, (task, metric)
    assert own(memory) == own(disk)
    alone = validate(CONFIG, export, tmp_path / "alone", *options(data, original, "disk"), "--model.reference=null")
    assert own(alone) == own(disk)
    assert not (tmp_path / "alone/original").exists()


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_the_original_differs_in_nothing_from_itself(mode: str, original: Path, data: Path, tmp_path: Path) -> None:
    results = validate(CONFIG, original, tmp_path, *options(data, original, mode))
    assert compared(results) == {key: 0.0 if key[1] == "kl" else 1.0 for key in compared(results)}


def test_stored_logits_serve_the_next_model(
    original: Path, export: Path, data: Path, tmp_path: Path, loaded: Counter[str]
) -> None:
    validate(CONFIG, export, tmp_path, *options(data, original, "disk"))
    stored = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "original").iterdir()}
    loaded.clear()
    results = validate(CONFIG, original, tmp_path, *options(data, original, "disk"))
    assert loaded == {str(original): 1}
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "original").iterdir()} == stored
    assert compared(results) == {key: 0.0 if key[1] == "kl" else 1.0 for key in compared(results)}
    # The export again, from its records alone and then from the beginning.
    validate(CONFIG, export, tmp_path, *options(data, original, "disk"), "--model.restart=true")
    assert loaded == {str(original): 1, str(export): 1}


def test_a_disk_without_room_is_refused_before_anything_is_stored(
    original: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1 << 28))
    monkeypatch.setattr("moeq.evaluation.reference_logits.shutil", full)
    message = (
        rf"logits need \d\.\d GB in {re.escape(str(tmp_path))}/original, which has 0\.0 GB left; lower num_documents"
    )
    with pytest.raises(SystemExit, match=message):
        validate(CONFIG, original, tmp_path, *options(data, original, "disk"))
    assert not list(tmp_path.glob("original/*.safetensors"))
    assert not (tmp_path / "results.json").exists()


def test_logits_of_another_original_are_refused(original: Path, data: Path, tmp_path: Path) -> None:
    few = [*options(data, original, "disk"), "--data.tasks=[sums]", "--data.domains=null"]
    validate(CONFIG, original, tmp_path, *few)
    other = save_tiny("qwen2_moe", tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match=r"holds the logits of another original \(model: .*delete it"):
        validate(CONFIG, original, tmp_path, *few, f"--model.reference={other}")


def test_an_original_of_another_vocabulary_is_refused(original: Path, data: Path, tmp_path: Path) -> None:
    other = save_tiny("qwen2_moe", tmp_path / "other", vocab_size=300)
    with pytest.raises(
        SystemExit, match=r"vocabulary of 264 tokens, and the original .* one of 300; give --model\.reference"
    ):
        validate(CONFIG, original, tmp_path, *options(data, other, "memory"))
