"""What validate refuses, in one line that says why; and a task of one's own, which it does not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import moeq.evaluation.open_models
from main import main
from tests.evaluation_data import documents_of, write_evaluation_data, write_rows
from tests.test_main import QUIET, validate
from tests.tiny import save_tiny

CONFIG = Path("configs/eval.yaml")
OWN_TASK = """
from moeq.tasks.task import MultipleChoice, Source

PARITY = MultipleChoice(
    name="parity", source=Source("parity", hub=None, splits=("test",)), groups=lambda row: [row["size"]],
    context=lambda row: f"{row['number']} is", choices=lambda row: ["even", "odd"],
    answer=lambda row: row["number"] % 2, metrics={"acc": "mean"},
)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("refused") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_data(tmp_path_factory.mktemp("refused") / "data")


def options(data: Path, *more: str) -> list[str]:
    return [f"--data.data_dir={data}", "--data.domains=null", "--model.reference=null", *more]


def refused(message: str) -> "pytest.RaisesContext[SystemExit]":
    return pytest.raises(SystemExit, match=message)


def no_model(*_: object, **__: object) -> nn.Module:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.tasks=[humaneval]"], "task 'humaneval' runs programs .* give --data.execute_code true"),
        (["--data.tasks=[moequant]"], "task 'humaneval_moequant' runs programs that the model wrote"),
        (["--data.tasks=[helaswag]"], "helaswag.*hellaswag"),
        (["--data.tasks=[no.such:TASK]"], "no.such"),
        (["--data.tasks=[boolq]", "--data.num_shots={mmlu: 5}"], r"num_shots names \['mmlu'\], which are not among"),
        (["--data.tasks=[]"], "nothing to evaluate"),
        (["--trainer.limit_val_batches=0"], r"limit_val_batches \(0\) evaluates nothing"),
        (["--data.num_documents=0"], r"num_documents \(0\) must be positive"),
        (["--data.evaluation.num_windows=3"], "evaluation"),
        (["--data.sampling.num_samples=4"], r"num_samples \(4\) above 1 needs a temperature"),
    ],
)
def test_a_mistake_in_the_options_leaves_nothing_behind(
    more: list[str], message: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moeq.evaluation.open_models, "load_model", no_model)
    with refused(message):
        validate(CONFIG, model, tmp_path / "run", *options(data, *more))
    assert not (tmp_path / "run").exists()


def test_missing_data_are_named_before_a_model_is_loaded(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moeq.evaluation.open_models, "load_model", no_model)
    empty = tmp_path / "data"
    empty.mkdir()
    folder = re.escape(str(empty / "hellaswag"))
    with refused(
        rf"no file validation\.jsonl \(or \.txt, also \.gz\) in folder {folder}, which does not exist; "
        r"download split validation of the data set Rowan/hellaswag there as JSON lines"
    ):
        validate(CONFIG, model, tmp_path / "run", *options(empty, "--data.tasks=[hellaswag]"))
    write_rows(empty / "gsm8k/test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with refused(r"no file train\.jsonl .*gsm8k, which has test\.jsonl; download split train .*openai/gsm8k"):
        validate(CONFIG, model, tmp_path / "run", *options(empty, "--data.tasks=[gsm8k]"))
    with refused(r"no file none\.txt \(also \.gz\)"):
        validate(CONFIG, model, tmp_path / "run", *options(data, "--data.domains={prose: none.txt}"))
    assert not (tmp_path / "run/results.json").exists()


def test_a_row_that_is_none_of_the_task_s_is_named_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moeq.evaluation.open_models, "load_model", no_model)
    write_rows(tmp_path / "data/boolq/validation.jsonl", [{"question": "is rain wet"}])
    with refused(r"task boolq \(.*boolq/validation\.jsonl\): document 0, with the fields .*KeyError: '(answer|label)'"):
        validate(CONFIG, model, tmp_path / "run", *options(tmp_path / "data", "--data.tasks=[boolq]"))
    unlabelled = [{**row, "label": ""} for row in documents_of("hellaswag")]
    write_rows(tmp_path / "data/hellaswag/validation.jsonl", [*documents_of("hellaswag"), *unlabelled])
    with refused(r"task hellaswag \(.*\): document 4, .*ValueError: invalid literal"):
        validate(CONFIG, model, tmp_path / "run", *options(tmp_path / "data", "--data.tasks=[hellaswag]"))
    write_rows(tmp_path / "data/wikitext-2-raw/test.jsonl", [{"page": "text"}])
    with refused(r"task wikitext \(.*\): a row lacks the field 'text'"):
        validate(CONFIG, model, tmp_path / "run", *options(tmp_path / "data", "--data.tasks=[wikitext]"))


@pytest.mark.parametrize("task", ["boolq", "sums", "wikitext"])
@pytest.mark.parametrize("whose", ["the model", "the original in memory", "the original on disk"])
def test_a_nan_stops_the_run_with_task_document_and_module(
    whose: str, task: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = save_tiny("qwen2_moe", tmp_path / "damaged")
    load = moeq.evaluation.open_models.load_model

    def planted(name: str, *args: Any, **more: Any) -> nn.Module:
        loaded = load(name, *args, **more)
        if name == str(damaged):  # after the weights were checked
            loaded.get_parameter("model.layers.1.mlp.experts.down_proj")[:, 3, 5] = torch.nan
        return loaded

    monkeypatch.setattr(moeq.evaluation.open_models, "load_model", planted)
    name, reference = (damaged, "null") if whose == "the model" else (model, str(damaged))
    mode = "disk" if whose.endswith("disk") else "memory"
    more = [f"--data.tasks=[{task}]", "--data.num_documents=3", f"--model.reference_mode={mode}"]
    who = whose.removesuffix(" in memory").removesuffix(" on disk")
    with refused(rf"task {task}, document \d") as caught:
        validate(CONFIG, name, tmp_path / "run", *options(data, *more, f"--model.reference={reference}"))
    assert "model.layers.1.mlp.experts" in str(caught.value)
    assert who in str(caught.value) or (who == "the model" and task == "sums")
    assert not (tmp_path / "run/results.json").exists()
    assert not list((tmp_path / "run").glob("documents/*.jsonl"))


def test_a_share_of_a_single_batch_is_refused_in_one_line(model: Path, data: Path, tmp_path: Path) -> None:
    with refused(r"moeq: .*0\.5 of the `val_dataloader` .*Try at least `limit_val_batches=1\.0`"):
        validate(CONFIG, model, tmp_path, *options(data, "--data.tasks=[boolq]", "--trainer.limit_val_batches=0.5"))


def test_validate_needs_tasks(model: Path, tmp_path: Path) -> None:
    arguments = [f"--model.name={model}", f"--trainer.default_root_dir={tmp_path}", *QUIET]
    with refused("validate needs evaluation tasks, and TextDataModule has calibration data only; take configs/eval"):
        main(["validate", "--config", "configs/rtn_w3.yaml", *arguments])


def test_configurations_of_fit_know_no_evaluation(model: Path, tmp_path: Path) -> None:
    for path in sorted(Path("configs").glob("*.yaml")):
        if "eval" not in path.stem:
            assert "evaluation" not in yaml.safe_load(path.read_text())["data"]["init_args"], path
    arguments = [f"--model.name={model}", f"--trainer.default_root_dir={tmp_path}", *QUIET]
    with refused("evaluation"):
        main(["fit", "--config", "configs/rtn_w3.yaml", *arguments, "--data.evaluation.num_windows=2"])


def test_a_task_of_one_s_own_runs_beside_those_of_the_catalog(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/mytasks.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    rows = [{"number": n, "size": "small" if n < 5 else "large"} for n in range(12)]
    write_rows(data / "parity/test.jsonl", rows)
    tasks = "--data.tasks=[mytasks:PARITY, boolq]"
    results = validate(CONFIG, model, tmp_path / "run", *options(data, tasks, "--data.num_shots={parity: 0}"))
    parity, _ = results["tasks"]
    assert (parity["task"], parity["num_documents"], parity["chance"]) == ("parity", 12, 0.5)
    assert {group: found["acc"]["num_documents"] for group, found in parity["groups"].items()} == {
        "small": 5, "large": 7
    }  # fmt: skip
    by_hand = 0
    for line in (tmp_path / "run/documents/parity.rank0.jsonl").read_text().splitlines()[1:]:
        result = json.loads(line)
        even, odd = result["details"]["loglikelihoods"]
        by_hand += (odd > even) == result["index"] % 2
    assert parity["metrics"]["acc"]["value"] == pytest.approx(by_hand / 12)
