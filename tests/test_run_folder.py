"""A run that is refused leaves every byte of its folder as it was, and no second run works in a folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import moeq.evaluation.validation
import moeq.forecast_validation
from callbacks.export import Export
from main import main
from moeq.disk.lock import FolderLock
from tests.evaluation_data import write_text
from tests.test_main import QUIET, fit, validate
from tests.tiny import save_tiny

RTN = Path("configs/rtn_w3.yaml")


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder by name: bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(RTN, model, folder)
    return folder


@pytest.fixture
def interrupted(finished: Path, tmp_path: Path) -> Path:
    """A run that was killed before its exports."""
    folder = tmp_path / "interrupted"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("export", "dense"))
    return folder


def with_awq(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with AWQ in the place of rounding."""
    steps = list(config["trainer"]["callbacks"])
    at = next(i for i, step in enumerate(steps) if step["class_path"] == "RTN")
    steps[at : at + 1] = [{"class_path": "HessianCalibration"}, {"class_path": "AWQ"}]
    return config | {"trainer": config["trainer"] | {"callbacks": steps}}


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def refusal(message: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError(message)

    return refuse


def refused(message: str) -> "pytest.RaisesContext[SystemExit]":
    return pytest.raises(SystemExit, match=message)


def test_a_finished_run_is_not_touched_by_another(finished: Path, model: Path) -> None:
    before = content(finished)
    assert "run.lock" not in before
    with refused("export exists and is not empty"):
        fit(RTN, model, finished, "--model.bits=4")
    with refused("export exists and is not empty"):
        fit(RTN, model, finished, "--model.bits=4", "--model.restart=true")
    assert content(finished) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.bits=4"], "blocks of a run with another configuration"),
        (["--data.seed=1"], "blocks of a run with another data"),
        (["--data.path=none.txt"], "none.txt"),
        (["--trainer.limit_train_batches=0.5", "--model.restart=true"], "0.5 of 1 batches calibrates on nothing"),
        (["--data.batch_size=4", "--model.group_size=24"], "must divide in_features"),
    ],
)
def test_the_plan_and_the_blocks_of_a_killed_run_survive_what_else_is_tried(
    options: list[str], message: str, interrupted: Path, model: Path
) -> None:
    before = content(interrupted)
    with refused(message):
        fit(RTN, model, interrupted, *options)
    assert content(interrupted) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.bits=4"], "holds allocation.json of a run with another configuration; set --trainer.default_root"),
        (["--data.seed=1"], "holds allocation.json of a run with another data"),
    ],
)
def test_the_plan_of_a_run_that_was_killed_before_its_first_block_survives_what_else_is_tried(
    options: list[str], message: str, interrupted: Path, model: Path
) -> None:
    shutil.rmtree(interrupted / "blocks")
    before = content(interrupted)
    with refused(message):
        fit(RTN, model, interrupted, *options)
    assert content(interrupted) == before


def test_a_plan_of_which_no_run_is_known_is_not_written_over(model: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "allocation.json", tmp_path)
    before = content(tmp_path)
    with refused("holds allocation.json, and no fingerprint.json that says of which run"):
        fit(RTN, model, tmp_path)
    assert content(tmp_path) == before


def test_a_run_goes_on_from_its_own_plan_and_another_one_starts_over_when_asked(
    interrupted: Path, finished: Path, model: Path
) -> None:
    shutil.rmtree(interrupted / "blocks")
    fit(RTN, model, interrupted)
    assert (interrupted / "allocation.json").read_bytes() == (finished / "allocation.json").read_bytes()
    shutil.rmtree(interrupted / "export")
    shutil.rmtree(interrupted / "dense")
    fit(RTN, model, interrupted, "--model.bits=4", "--model.restart=true")
    assert (interrupted / "allocation.json").read_bytes() != (finished / "allocation.json").read_bytes()


def test_what_a_step_refuses_late_is_refused_before_blocks_are_deleted(interrupted: Path, model: Path) -> None:
    """AWQ needs the schedule to know that it cannot work."""
    other = written(interrupted.parent / "awq_w3.yaml", with_awq(yaml.safe_load(RTN.read_text())))
    before = content(interrupted)
    with refused("AWQ needs the Hessians of all experts of a block in one pass"):
        fit(other, model, interrupted, "--model.restart=true", "--model.hessian_gib=0.0001")
    assert content(interrupted) == before


def test_a_refused_run_has_sampled_nothing(interrupted: Path, model: Path, tmp_path: Path) -> None:
    """By what a step finds in the schedule, and by blocks that were calibrated on other data."""
    small = {"mode": "stochastic", "num_sequences": 4, "length": 24, "sequences_at_once": 4, "batch_size": 2}
    config = yaml.safe_load(RTN.read_text()) | {"data": {"class_path": "EBSSDataModule", "init_args": small}}
    sampled = written(tmp_path / "ebss.yaml", config)
    names = [f"--model.name={model}", "--model.group_size=16", *QUIET]
    before = content(interrupted)
    with refused("holds blocks of a run with another calibration set"):
        # Its blocks begin like those of a run on windows of text with the same batches.
        same = ["--data.batch_size=1", f"--trainer.default_root_dir={interrupted}"]
        main(["fit", "--config", str(sampled), *names, *same])
    assert content(interrupted) == before
    refusing = written(tmp_path / "awq.yaml", with_awq(config))
    with refused("AWQ needs the Hessians of all experts of a block in one pass"):
        bound = ["--model.hessian_gib=0.0001", f"--trainer.default_root_dir={tmp_path / 'run'}"]
        main(["fit", "--config", str(refusing), *names, *bound])
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_run_in_a_folder_that_is_in_use_is_refused_by_the_name_of_the_other(interrupted: Path, model: Path) -> None:
    with FolderLock(interrupted):
        before = content(interrupted)
        with refused(rf"moeq: .*interrupted is in use by another run \(process {os.getpid()} on .*; wait for its end"):
            fit(RTN, model, interrupted)
        with refused("in use by another run"):
            validate(Path("configs/eval.yaml"), model, interrupted, "--model.reference=null")
        assert content(interrupted) == before
    fit(RTN, model, interrupted)
    assert not (interrupted / "run.lock").exists()


def test_a_refused_validate_leaves_nothing(finished: Path, model: Path) -> None:
    before = content(finished)
    with refused("no model found"):
        validate(Path("configs/eval.yaml"), Path("nowhere"), finished, "--model.reference=null")
    with refused("vocabulary"):
        other = save_tiny("qwen2_moe", finished.parent / "other", vocab_size=300)
        few = ["--data.domains=null", "--data.tasks=[sums]", "--data.num_documents=2", f"--model.reference={other}"]
        validate(Path("configs/eval.yaml"), model, finished, *few)
    assert content(finished) == before


def test_finished_documents_survive_a_refused_restart(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the data of a later task, what the run needs, its original, and the model itself."""
    write_text(tmp_path / "data/arithmetic_sums.txt", "".join(f"{n} + 1 = {n + 1}\n" for n in range(8)))
    folder = tmp_path / "run"

    def evaluate(*options: str) -> None:
        mine = ["--data.domains=null", f"--data.data_dir={tmp_path / 'data'}", "--data.max_length=256"]
        validate(Path("configs/eval.yaml"), model, folder, *mine, f"--model.reference={model}", *options)

    evaluate("--data.tasks=[sums]", "--model.reference_mode=disk")
    before = content(folder)
    again = ["--data.tasks=[sums]", "--model.restart=true"]
    with refused("no file validation"):
        evaluate("--data.tasks=[sums,boolq]", "--model.restart=true")
    with refused("preflight"), monkeypatch.context() as patch:
        patch.setattr(moeq.forecast_validation, "check_room", refusal("preflight"))
        evaluate(*again)
    opened = moeq.evaluation.validation.open_scorer
    for mode, damaged in (("memory", 0), ("memory", 1), ("disk", 0)):
        # The original is opened before the model.
        answers = iter([opened] * damaged + [refusal("not opened")])
        with refused("not opened"), monkeypatch.context() as patch:
            patch.setattr(moeq.evaluation.validation, "open_scorer", lambda *a, left=answers: next(left)(*a))
            evaluate(*again, f"--model.reference_mode={mode}")
    assert content(folder) == before
    evaluate(*again)
    assert (folder / "documents/sums.rank0.jsonl").read_bytes() == before["documents/sums.rank0.jsonl"]


@pytest.mark.slow
def test_a_disk_that_fills_up_after_the_export_is_one_line_and_the_run_can_be_finished(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callbacks after Export write their files; TensorBoard writes its own in a way of its own."""
    exported = Export.on_fit_end

    def full(step: Export, *hook: object) -> None:
        exported(step, *hook)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device", "events.out")

    with monkeypatch.context() as patch:
        patch.setattr(Export, "on_fit_end", full)
        with refused("moeq: events.out: the disk is full; make room on it, then start the same command again"):
            fit(RTN, model, tmp_path)
    assert (tmp_path / "export").is_dir()
    fit(RTN, model, tmp_path)
    for name in ("export/model.safetensors", "dense/model.safetensors", "allocation.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    assert (tmp_path / "summary.md").is_file()
    with refused("export exists and is not empty"):
        fit(RTN, model, tmp_path)
