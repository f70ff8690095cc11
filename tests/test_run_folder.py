"""A run that is refused leaves every byte of its folder as it was, and no second run works in a folder."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from callbacks.export import Export
from moeq.disk.lock import FolderLock
from tests.test_main import fit, validate
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


def test_what_a_step_refuses_late_is_refused_before_blocks_are_deleted(interrupted: Path, model: Path) -> None:
    """AWQ needs the schedule to know that it cannot work."""
    config = yaml.safe_load(RTN.read_text())
    steps = config["trainer"]["callbacks"]
    at = next(i for i, step in enumerate(steps) if step["class_path"] == "RTN")
    steps[at : at + 1] = [{"class_path": "HessianCalibration"}, {"class_path": "AWQ"}]
    other = interrupted.parent / "awq_w3.yaml"
    other.write_text(yaml.safe_dump(config))
    before = content(interrupted)
    with refused("AWQ needs the Hessians of all experts of a block in one pass"):
        fit(other, model, interrupted, "--model.restart=true", "--model.hessian_gib=0.0001")
    assert content(interrupted) == before


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
