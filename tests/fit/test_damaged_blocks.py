"""A fit that continues: on a damaged block, on a datamodule of the user's own, with other callbacks."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeq.fit.block_files import block_path
from tests.tiny import save_tiny

STEPS = ["hessian_calibration.HessianCalibration", "gptq.GPTQ", "record.Record"]


def write_config(path: Path, *before: Any) -> Path:
    content = yaml.safe_load(Path("configs/gptq_text_w3.yaml").read_text())
    content["trainer"]["callbacks"] = [*before, *({"class_path": f"callbacks.{step}"} for step in STEPS)]
    content["data"] = {"class_path": "tests.own_fit.Own"}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("damaged") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "own.yaml")


def run_fit(config: Path, model: Path, folder: Path, *options: str) -> dict[str, bytes]:
    """Fit, and what its finished blocks hold."""
    from main import main

    names = [f"--model.name={model}", "--model.group_size=16", f"--trainer.default_root_dir={folder}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    main(["fit", "--config", str(config), *names, *quiet, *options])
    return {path.name: path.read_bytes() for path in sorted((folder / "blocks").iterdir())}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_block_is_one_line_and_done_again(
    damage: str, config: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_fit(config, model, tmp_path)
    path = block_path(tmp_path, 1)
    content = bytearray(whole[path.name])
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[damage])
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        again = run_fit(config, model, tmp_path)
    lines = {record.getMessage() for record in caplog.records if "quantized again" in record.getMessage()}
    assert len(lines) == 1
    (line,) = lines
    assert "block_001.safetensors is" in line
    assert line.endswith("the block is quantized again; so are those after it")
    assert "Resuming: blocks 0 to 0 of 3 are finished" in caplog.text
    assert again["block_000.safetensors"] == whole["block_000.safetensors"]
    assert again["block_002.safetensors"] == whole["block_002.safetensors"]
    reasons = [fallback["reason"] for fallback in json.loads((tmp_path / "fallbacks.json").read_text())]
    assert reasons.count("finished block was damaged") == 1


def test_blocks_of_other_data_of_a_datamodule_of_ones_own_are_refused(
    config: Path, model: Path, tmp_path: Path
) -> None:
    run_fit(config, model, tmp_path)
    block_path(tmp_path, 2).unlink()
    with pytest.raises(SystemExit, match="blocks of a run with another data"):
        run_fit(config, model, tmp_path, "--data.seed=1")
    assert len(run_fit(config, model, tmp_path)) == 3


def test_blocks_of_another_order_of_callbacks_are_refused(config: Path, model: Path, tmp_path: Path) -> None:
    rotations = [{"class_path": "callbacks.rotation.Rotation", "init_args": {"seed": seed}} for seed in (1, 2)]
    run_fit(write_config(tmp_path / "two.yaml", *rotations), model, tmp_path / "run")
    block_path(tmp_path / "run", 2).unlink()
    with pytest.raises(SystemExit, match="blocks of a run with another configuration"):
        run_fit(write_config(tmp_path / "turned.yaml", *rotations[::-1]), model, tmp_path / "run")
