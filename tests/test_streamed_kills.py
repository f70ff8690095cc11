"""A streamed fit that is killed, while it exports as well, ends with the bytes of one that was not."""

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from benchmarks.large.killed import differing_files, has_ended
from tests.processes import run
from tests.test_main import QUIET, fit, small_data
from tests.tiny import save_tiny

CONFIG = Path("configs/gptq_text_w3.yaml")
OPTIONS = ["--model.placement=stream", "--model.group_size=16", "--model.damping=0.1"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("kills") / "model")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("kills") / "whole"
    fit(CONFIG, model, folder, *OPTIONS)
    return folder


def killed_before(name: str, model: Path, folder: Path) -> None:
    """Start or continue a run until a file or folder is about to get its name."""
    config = yaml.safe_load(CONFIG.read_text())
    killer = {"class_path": "tests.killer.KillBeforeName", "init_args": {"name": name}}
    config["trainer"]["callbacks"].insert(0, killer)
    path = folder.with_name("killing.yaml")
    path.write_text(yaml.safe_dump(config))
    options = ["--model.name", str(model), "--trainer.default_root_dir", str(folder)]
    done = run(["fit", "--config", str(path), *options, *small_data(CONFIG), *QUIET, *OPTIONS])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not has_ended(folder)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    for name in ("block_001.safetensors", "export", "dense", "verification.json", "summary.md"):
        killed_before(name, model, folder)
    fit(CONFIG, model, folder, *OPTIONS)
    assert has_ended(folder)
    assert differing_files(whole, folder) == []


def test_a_byte_that_differs_is_seen(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    path = other / "export/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (other / "dense/config.json").unlink()
    assert differing_files(whole, other) == ["dense/config.json", "export/model.safetensors"]
