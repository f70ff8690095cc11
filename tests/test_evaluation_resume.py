"""An evaluation that is killed continues, and several ranks measure what one does."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import moeq.evaluation.open_models
from moeq.evaluation.evaluator import Evaluator
from moeq.tasks.documents import Document, Result
from moeq.tasks.task import Task
from tests.evaluation_data import write_evaluation_data
from tests.processes import run
from tests.test_main import QUIET, validate
from tests.tiny import save_tiny

CONFIG = Path("configs/eval.yaml")
pytestmark = pytest.mark.slow
# Likelihood with few documents and with groups, running text, whole pages, and generation.
TASKS = ["boolq", "mmlu", "wikitext", "gsm8k", "sums"]
COUNTS = {"prose": 5, "boolq": 4, "mmlu": 6, "wikitext": 40, "gsm8k": 6, "sums": 21}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("evaluated") / "data")


class Watch:
    """What a run computes: documents by task, and forward passes of the models."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.documents: list[tuple[str, int]] = []
        self.num_passes = 0
        evaluate, load = Evaluator.run, moeq.evaluation.open_models.load_model

        def watched_run(evaluator: Evaluator, task: Task, documents: Sequence[Document]) -> list[Result]:
            self.documents += [(task.name, document.index) for document in documents]
            return evaluate(evaluator, task, documents)

        def watched_load(*args: Any, **more: Any) -> nn.Module:
            model = load(*args, **more)
            model.register_forward_hook(self._count)
            return model

        patch.setattr(Evaluator, "run", watched_run)
        patch.setattr(moeq.evaluation.open_models, "load_model", watched_load)

    def _count(self, *_: object) -> None:
        self.num_passes += 1

    def forget(self) -> None:
        self.documents, self.num_passes = [], 0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def options(data: Path, *more: str) -> list[str]:
    domain = ["--data.domains={prose: wikitext2_test.txt}", "--data.window_length=64", "--data.num_windows=5"]
    return [f"--data.tasks=[{','.join(TASKS)}]", *domain, f"--data.data_dir={data}", "--model.reference=null", *more]


def measured(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how a run came about: counts, values and standard errors."""
    names = ("metrics", "groups", "num_documents", "num_truncated", "partial")
    return {task["task"]: {name: task[name] for name in names} for task in results["tasks"]}


def recorded(folder: Path) -> dict[str, list[str]]:
    """Results on disk by task, sorted by document."""
    found: dict[str, list[str]] = {}
    for path in folder.glob("documents/*.jsonl"):
        found.setdefault(path.name.split(".")[0], []).extend(path.read_text().splitlines()[1:])
    return {task: sorted(lines, key=lambda line: json.loads(line)["index"]) for task, lines in found.items()}


def test_a_killed_evaluation_continues_and_ends_with_the_same_results(
    model: Path, data: Path, tmp_path: Path, watch: Watch
) -> None:
    small = options(data, "--data.batch_tokens=1024")
    whole = validate(CONFIG, model, tmp_path / "whole", *small)
    assert {task["task"]: task["num_documents"] for task in whole["tasks"]} == COUNTS
    everything = sorted(watch.documents)
    assert len(everything) == len(set(everything)) == sum(COUNTS.values())
    config = yaml.safe_load(CONFIG.read_text())
    killer = {"class_path": "tests.killer.KillWhileEvaluating", "init_args": {"task": 3, "num_batches": 3}}
    config["trainer"]["callbacks"].append(killer)
    killing = tmp_path / "killing.yaml"
    killing.write_text(yaml.safe_dump(config))
    folder = tmp_path / "killed"
    names = [f"--model.name={model}", f"--trainer.default_root_dir={folder}"]
    killed = run(["validate", "--config", str(killing), *names, *QUIET, *small])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "results.json").exists()
    finished = {(task, json.loads(line)["index"]) for task, lines in recorded(folder).items() for line in lines}
    assert {task for task, _ in finished} == {"prose", "boolq", "mmlu", "wikitext"}
    assert 0 < sum(task == "wikitext" for task, _ in finished) < COUNTS["wikitext"]

    watch.forget()
    resumed = validate(CONFIG, model, folder, *small)
    assert sorted(watch.documents) == sorted(set(everything) - finished)
    assert sum(task["num_resumed"] for task in resumed["tasks"]) == len(finished)
    assert measured(resumed) == measured(whole)
    assert recorded(folder) == recorded(tmp_path / "whole")


def test_what_is_finished_is_not_computed_again_but_in_a_restart(
    model: Path, data: Path, tmp_path: Path, watch: Watch
) -> None:
    first = validate(CONFIG, model, tmp_path, *options(data))
    watch.forget()
    again = validate(CONFIG, model, tmp_path, *options(data))
    assert (watch.documents, watch.num_passes) == ([], 0)
    assert measured(again) == measured(first)
    restarted = validate(CONFIG, model, tmp_path, *options(data, "--model.restart=true"))
    assert len(watch.documents) == sum(COUNTS.values())
    assert watch.num_passes > 0
    assert measured(restarted) == measured(first)
    assert all(len(lines) == COUNTS[task] for task, lines in recorded(tmp_path).items())


def test_results_of_other_settings_are_not_used_and_are_there_when_one_goes_back(
    model: Path, data: Path, tmp_path: Path, watch: Watch
) -> None:
    few = options(data, "--data.tasks=[boolq,sums]")
    first = validate(CONFIG, model, tmp_path, *few)
    num_documents = len(watch.documents)
    for change in ("--model.dtype=float32", f"--model.reference={model}", "--data.num_shots={boolq: 0}"):
        watch.forget()
        other = validate(CONFIG, model, tmp_path, *few, change)
        assert len(watch.documents) == (0 if "shots" in change else num_documents), change
        notes = [note for task in other["tasks"] for note in task["notes"]]
        assert any("of another evaluation are not used" in note for note in notes)
    watch.forget()
    again = validate(CONFIG, model, tmp_path, *few)
    assert watch.num_passes == 0
    assert measured(again) == measured(first)


def test_a_quick_look_is_marked_as_partial_and_becomes_whole(model: Path, data: Path, tmp_path: Path) -> None:
    few = options(data, "--data.tasks=[boolq,mmlu]", "--data.domains=null", "--data.batch_tokens=256")
    whole = validate(CONFIG, model, tmp_path / "whole", *few)
    assert not whole["rows"][0]["partial"]
    assert "partial" not in (tmp_path / "whole/results.md").read_text()
    for option in ("num_documents", "limit_val_batches"):
        owner = "data" if option == "num_documents" else "trainer"
        look = validate(CONFIG, model, tmp_path / option, *few, f"--{owner}.{option}=1")
        assert look["rows"][0]["partial"]
        for task, all_of_it in zip(look["tasks"], whole["tasks"], strict=True):
            assert task["partial"]
            assert task["partial_reason"] == option
            assert 0 < task["num_documents"] < task["num_available"] == COUNTS[task["task"]]
            assert 0 < task["num_tokens"] < all_of_it["num_tokens"]
        table = (tmp_path / option / "results.md").read_text()
        assert f"partial: {look['tasks'][0]['num_documents']} of 4 ({option})" in table
        assert "(partial)" in table
        assert measured(validate(CONFIG, model, tmp_path / option, *few)) == measured(whole)


def test_ranks_evaluate_as_one(model: Path, data: Path, tmp_path: Path, watch: Watch) -> None:
    # Three ranks share two windows; neither 2 nor 3 divides the numbers of documents of all tasks.
    names = [f"--data.tasks=[{','.join(set(TASKS) - {'gsm8k'})}]", "--data.num_windows=2", "--model.dtype=float32"]
    small = [*options(data, *names, "--data.batch_tokens=512"), f"--model.reference={model}"]
    one = measured(validate(CONFIG, model, tmp_path / "1", *small))
    counts = {task: found["num_documents"] for task, found in one.items()}
    assert counts == {"prose": 2, **{task: COUNTS[task] for task in counts.keys() - {"prose"}}}
    # Three ranks continue what one began, and compare with an original on disk.
    begun = (tmp_path / "1/documents/wikitext.rank0.jsonl").read_text().splitlines(keepends=True)[:18]
    (tmp_path / "3/documents").mkdir(parents=True)
    (tmp_path / "3/documents/wikitext.rank0.jsonl").write_text("".join(begun))
    # Forked ranks need not import everything again.
    forked = ["--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy", "--trainer.strategy.start_method=fork"]
    for num_ranks, more in ((2, ["--trainer.strategy=moeq_ddp"]), (3, [*forked, "--model.reference_mode=disk"])):
        folder = tmp_path / str(num_ranks)
        names = [f"--model.name={model}", f"--trainer.default_root_dir={folder}", f"--trainer.devices={num_ranks}"]
        done = run(["validate", "--config", str(CONFIG), *names, *QUIET, *small, *more])
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        results = json.loads((folder / "results.json").read_text())
        assert results["num_ranks"] == num_ranks
        several = measured(results)
        for task, found in one.items():
            assert several[task] == approximately(found), task
        assert {task: len(lines) for task, lines in recorded(folder).items()} == counts
    assert sum(task["num_resumed"] for task in results["tasks"]) == 17
    watch.forget()
    assert measured(validate(CONFIG, model, folder, *small)) == approximately(one)
    assert watch.num_passes == 0


def approximately(found: Any) -> Any:
    """The numbers of nested mappings, to within the rounding of other batches."""
    if isinstance(found, dict):
        return {name: approximately(value) for name, value in found.items()}
    return pytest.approx(found, rel=1e-5, abs=1e-6) if isinstance(found, float) else found
