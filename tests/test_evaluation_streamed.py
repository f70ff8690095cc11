"""What does not fit is evaluated block by block: the same numbers as in memory, resumable, an original as well."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moeq.evaluation.open_models
import moeq.evaluation.placing
from moeq.evaluation.evaluator import Evaluator
from moeq.scoring.scorer import TWO_PASSES
from moeq.scoring.streamed import StreamedScorer
from tests.evaluation_data import write_evaluation_data
from tests.processes import run
from tests.test_main import QUIET, fit, validate
from tests.tiny import save_tiny

CONFIG = Path("configs/eval.yaml")
pytestmark = pytest.mark.slow
# Choices with a shared context, of one token and with examples, the last word, whole pages; and windows, a domain.
TASKS = ["arc_easy", "winogrande", "mmlu", "lambada_openai", "wikitext"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("streamed") / "original", dtype=torch.float32)


@pytest.fixture(scope="module")
def export(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    fit(Path("configs/rtn_w3.yaml"), original, folder)
    return folder / "export"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("streamed") / "data")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time."""
    monkeypatch.setattr("callbacks.results.draw", lambda *_: None)


def options(data: Path, *more: str) -> list[str]:
    return [
        f"--data.tasks=[{','.join(TASKS)}]", "--data.domains={prose: wikitext2_test.txt}", "--data.window_length=64",
        "--data.num_windows=6", f"--data.data_dir={data}", "--data.batch_tokens=1024", "--data.num_documents=6",
        "--model.reference=null", *more,
    ]  # fmt: skip


def metrics(results: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    return {
        (task["task"], name): (found["value"], found["stderr"])
        for task in results["tasks"]
        for name, found in task["metrics"].items()
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal up to the rounding of another layout; what is counted is equal."""
    assert metrics(found).keys() == metrics(expected).keys()
    for (task, name), pair in metrics(expected).items():
        is_count = name.startswith(("acc", "top1", "router"))
        wanted = pair if is_count else pytest.approx(pair, rel=1e-5, abs=1e-9)
        assert metrics(found)[task, name] == wanted, (task, name)


def test_a_streamed_model_has_the_metrics_of_the_same_model_in_memory(
    original: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = validate(CONFIG, original, tmp_path / "stream", *options(data, "--model.placement=stream"))
    memory = validate(CONFIG, original, tmp_path / "memory", *options(data, "--model.placement=memory"))
    assert streamed["model"]["placement"] == {"model": "stream"}
    assert len(metrics(streamed)) >= len(TASKS) + 1
    assert_close(streamed, memory)
    monkeypatch.setattr(moeq.evaluation.placing.Places, "without", TWO_PASSES)
    same = validate(CONFIG, original, tmp_path / "same", *options(data, "--model.placement=memory"))
    assert metrics(same) == metrics(streamed)
    assert sorted(path.name for path in (tmp_path / "stream").iterdir()) == sorted(
        path.name for path in (tmp_path / "same").iterdir()
    )


@pytest.mark.parametrize("whose", ["the original", "both"])
def test_a_streamed_original_differs_from_a_model_as_much_as_one_in_memory(
    whose: str, original: Path, export: Path, data: Path, tmp_path: Path
) -> None:
    # A packed export is in memory whatever is asked, and may write text.
    model = (
        export if whose == "the original" else save_tiny("qwen2_moe", tmp_path / "other", seed=1, dtype=torch.float32)
    )
    tasks = f"--data.tasks=[arc_easy,wikitext{',sums' if whose == 'the original' else ''}]"
    compared = options(data, tasks, f"--model.reference={original}")
    streamed = validate(CONFIG, model, tmp_path / "stream", *compared, "--model.placement=stream")
    memory = validate(CONFIG, model, tmp_path / "memory", *compared, "--model.placement=memory")
    kind = "memory" if whose == "the original" else "stream"
    assert streamed["model"]["placement"] == {"model": kind, "reference": "stream"}
    assert {name for _, name in metrics(streamed)} >= {"kl", "top1_agreement", "router_agreement"}
    assert_close(streamed, memory)
    assert all(pair[0] > 0 for (_, name), pair in metrics(streamed).items() if name == "kl")
    assert all(0 < pair[0] < 1 for (_, name), pair in metrics(streamed).items() if name == "router_agreement")
    assert list((tmp_path / "stream/original").glob("*.safetensors"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each batch had that was evaluated."""
    counts: list[int] = []
    evaluate = Evaluator.run
    monkeypatch.setattr(
        Evaluator, "run", lambda self, task, documents: counts.append(len(documents)) or evaluate(self, task, documents)
    )
    return counts


def test_a_killed_run_continues_streamed_or_in_memory_without_what_is_finished(
    original: Path, data: Path, tmp_path: Path, evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = ["--data.tasks=[winogrande,arc_easy]", "--data.domains=null", "--data.batch_tokens=128"]
    small = options(data, *batches, "--model.placement=stream")
    config = yaml.safe_load(CONFIG.read_text())
    killer = {"class_path": "tests.killer.KillWhileEvaluating", "init_args": {"task": 1, "num_batches": 2}}
    config["trainer"]["callbacks"].append(killer)
    (tmp_path / "killing.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "killed"
    names = [f"--model.name={original}", f"--trainer.default_root_dir={folder}"]
    killed = run(["validate", "--config", str(tmp_path / "killing.yaml"), *names, *QUIET, *small])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"{original} needs 0.0 GB in memory" in killed.stderr
    assert "its blocks are streamed as asked" in killed.stderr
    lines = {path.name: len(path.read_text().splitlines()) - 1 for path in folder.glob("documents/*.jsonl")}
    assert set(lines) == {"winogrande.rank0.jsonl", "arc_easy.rank0.jsonl"}
    finished = sum(lines.values())

    whole = validate(CONFIG, original, tmp_path / "whole", *small)
    num_documents = sum(evaluated)
    assert 0 < finished < num_documents
    swept: list[str] = []
    expect = StreamedScorer.expect
    monkeypatch.setattr(
        StreamedScorer, "expect", lambda self, task, plans: swept.append(task) or expect(self, task, plans)
    )
    for more in ([], ["--model.placement=memory"]):
        evaluated.clear()
        again = tmp_path / f"resumed{len(more)}"
        shutil.copytree(folder, again)
        resumed = validate(CONFIG, original, again, *small, *more)
        assert sum(evaluated) == num_documents - finished
        assert sum(task["num_resumed"] for task in resumed["tasks"]) == finished
        assert_close(resumed, whole)
    assert swept == ["arc_easy"]


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(moeq.evaluation.placing, "free_bytes", lambda _: num_bytes)


def test_text_is_refused_of_a_streamed_model_with_the_numbers_and_before_any_work(
    original: Path, export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> Any:
        raise AssertionError("a model was opened")

    with monkeypatch.context() as patch:
        for name in ("load_model", "stream_model"):
            patch.setattr(moeq.evaluation.open_models, name, no_model)
        free(patch, 1000)
        message = (
            rf"the tasks \['sums', 'gsm8k'\] need text that the model writes, which a streamed model does not: "
            rf"{original} needs 0\.0 GB in memory, of 0\.0 GB that are free, so its blocks are streamed; evaluate a "
            "packed export of it that fits, or leave these tasks out"
        )
        with pytest.raises(SystemExit, match=message):
            validate(CONFIG, original, tmp_path / "run", *options(data, "--data.tasks=[sums,boolq,gsm8k]"))
        with pytest.raises(SystemExit, match=rf"{export} needs .* it is quantized already; open it where it fits"):
            validate(CONFIG, export, tmp_path / "run", *options(data, "--data.tasks=[boolq]"))
        beside = options(data, "--data.tasks=[boolq]", f"--model.reference={original}", "--model.reference_mode=memory")
        with pytest.raises(SystemExit, match=r"holds a model and its original whole, and .* choose 'disk' or 'auto'"):
            validate(CONFIG, original, tmp_path / "run", *beside)
    assert not (tmp_path / "run/results.json").exists()


def test_by_itself_what_fits_is_in_memory_and_what_does_not_is_streamed(
    original: Path, export: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = options(data, "--data.tasks=[arc_easy]", "--data.domains=null", f"--model.reference={original}")
    places = {}
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (export, original)]
    for name, num_bytes in {"both": 10 * sum(sizes), "export": int(1.2 * sizes[0])}.items():
        free(monkeypatch, num_bytes)
        found = validate(CONFIG, export, tmp_path / name, *compared)
        places[name] = found["model"]["placement"]
    assert places["both"] == {"model": "memory", "reference": "memory"}
    assert places["export"] == {"model": "memory", "reference": "stream"}


@pytest.mark.parametrize("whose", ["the model", "the original"])
def test_a_nan_in_a_streamed_block_stops_the_run_with_its_module(
    whose: str, original: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = save_tiny("qwen2_moe", tmp_path / "damaged")
    stream_model = moeq.evaluation.open_models.stream_model

    def planted(name: str, *args: Any, **more: Any) -> Any:
        model, stream = stream_model(name, *args, **more)
        if name == str(damaged):  # after the weights of a block were checked

            def plant(block: int) -> None:
                if block == 1:
                    model.get_parameter("model.layers.1.mlp.experts.down_proj")[:, 3, 5] = torch.nan

            stream.change_blocks(plant)
        return model, stream

    monkeypatch.setattr(moeq.evaluation.open_models, "stream_model", planted)
    name, reference = (damaged, "null") if whose == "the model" else (original, str(damaged))
    tasks = options(data, "--data.tasks=[boolq]", "--data.domains=null", f"--model.reference={reference}")
    message = rf"{whose} gave \d+ non-finite logits .* on task boolq, document \d.*model\.layers\.1\.mlp\.experts"
    with pytest.raises(SystemExit, match=message):
        validate(CONFIG, name, tmp_path / "run", *tasks, "--model.placement=stream")
    assert not list((tmp_path / "run").glob("documents/*.jsonl"))


def test_a_streamed_model_differs_in_nothing_from_itself_and_a_quick_look_sweeps_no_more_than_it_shows(
    original: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[int] = []
    expect = StreamedScorer.expect

    def counted(self: StreamedScorer, task: str, expected: Any) -> None:
        kept = list(expected)
        plans.append(len(kept))
        expect(self, task, kept)

    monkeypatch.setattr(StreamedScorer, "expect", counted)
    few = options(data, "--data.batch_tokens=256", "--data.tasks=[arc_easy]", f"--model.reference={original}")
    look = ["--model.placement=stream", "--trainer.limit_val_batches=1"]
    found = metrics(validate(CONFIG, original, tmp_path, *few, *look))
    assert plans == [1, 1, 1, 1]
    for task in ("prose", "arc_easy"):
        assert found[task, "kl"][0] == 0
        assert found[task, "top1_agreement"][0] == found[task, "router_agreement"][0] == 1
