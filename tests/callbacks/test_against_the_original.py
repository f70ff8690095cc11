"""RouterCalibration and LearnedRounding: steps that compare each block with the original's on its own states."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls, run_block
from tests.processes import TWO_RANKS, run
from tests.test_main import QUIET, fit, small_data
from tests.tiny import save_tiny

CONFIG = Path("configs/moequant_learned_w3.yaml")
pytestmark = pytest.mark.slow
WEIGHTS = "export/model.safetensors"
ROUTER, LEARNED = "RouterCalibration", "LearnedRounding"


def variant(folder: Path, *steps: str, num_steps: int = 20) -> Path:
    """The configuration with some of the two steps."""
    config = yaml.safe_load(CONFIG.read_text())
    callbacks = []
    for each in config["trainer"]["callbacks"]:
        name = each["class_path"].rpartition(".")[2]
        if name in (ROUTER, LEARNED) and name not in steps:
            continue
        options = {LEARNED: {"num_steps": num_steps}, "Export": {"formats": ["moeq"]}}
        callbacks.append({**each, "init_args": options[name]} if name in options else each)
    config["trainer"]["callbacks"] = callbacks
    path = folder / f"moequant_{'_'.join(steps) or 'neither'}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    folders = {}
    for name, steps in {"neither": (), "router": (ROUTER,), "learned": (LEARNED,), "both": (ROUTER, LEARNED)}.items():
        folders[name] = base / name
        fit(variant(base, *steps), model, folders[name])
    return folders


def block_errors(model: Path, run: Path) -> list[float]:
    """Relative error of the output of each block on the run's own calibration data, computed from its export."""
    paths = (model, run / "export")
    original, exported = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in paths)
    (path,) = (run / "calibration").glob("ebss-*.safetensors")
    inputs = {"input_ids": load_file(path)["ids_NT"].long()}
    states, errors = [], []
    for each in (original, exported):
        blocks = Adapter(original).blocks if each is original else each.model.layers
        calls = capture_calls(each, blocks, inputs)
        hidden, outputs = calls[0].hidden, []
        for block, call in zip(blocks, calls, strict=True):
            hidden = run_block(block, hidden, call)
            outputs.append(hidden)
        states.append(outputs)
    for wanted_BTD, found_BTD in zip(*states, strict=True):
        errors.append(float(((found_BTD - wanted_BTD).square().sum(-1) / wanted_BTD.square().sum(-1)).mean()))
    return errors


def test_learned_rounding_lowers_the_error_of_every_block(model: Path, runs: dict[str, Path]) -> None:
    before, after = (block_errors(model, runs[name]) for name in ("neither", "learned"))
    assert all(b < a for a, b in zip(before, after, strict=True)), (before, after)


def test_only_codes_and_scales_are_learned(model: Path, runs: dict[str, Path]) -> None:
    before, after = (load_file(runs[name] / WEIGHTS) for name in ("neither", "learned"))
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight_packed", "weight_scale"}
    assert before.keys() == after.keys()


def test_router_calibration_changes_the_routers_and_keeps_them_unquantized(model: Path, runs: dict[str, Path]) -> None:
    original, after = (load_file(path) for path in (model / "model.safetensors", runs["router"] / WEIGHTS))
    routers = [name for name in original if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert after[name].dtype == original[name].dtype
        assert not torch.equal(after[name], original[name])
        assert float((after[name] - original[name]).float().norm() / original[name].float().norm()) < 0.5


def test_a_resumed_run_ends_with_the_same_bytes_though_it_needs_the_original_blocks_again(
    model: Path, runs: dict[str, Path]
) -> None:
    whole = (runs["both"] / WEIGHTS).read_bytes()
    (runs["both"] / "export").rename(runs["both"] / "old")
    (runs["both"] / "blocks/block_001.safetensors").unlink()
    fit(variant(runs["both"].parent, ROUTER, LEARNED), model, runs["both"])
    assert (runs["both"] / WEIGHTS).read_bytes() == whole


def test_what_did_not_help_is_still_on_record_after_a_resume(tmp_path: Path) -> None:
    family = save_tiny("zaya", tmp_path / "model")  # its router is a network of several layers
    config = yaml.safe_load(variant(tmp_path, ROUTER, LEARNED).read_text())
    for each in config["trainer"]["callbacks"]:
        if each["class_path"].endswith(LEARNED):  # steps that can only do harm
            each["init_args"] = {"num_steps": 2, "level_rate": 0.99, "scale_rate": 0.99}
    path = tmp_path / "moequant_harm.yaml"
    path.write_text(yaml.safe_dump(config))
    fit(path, family, tmp_path / "run")

    def records() -> list[tuple[str, ...]]:
        return sorted(tuple(each.values()) for each in json.loads((tmp_path / "run/fallbacks.json").read_text()))

    whole = records()
    for reason in ("learned rounding did not help", "router not calibrated"):
        assert sum(reason in record for record in whole) == 2
    (tmp_path / "run/export").rename(tmp_path / "old")
    (tmp_path / "run/blocks/block_001.safetensors").unlink()
    fit(path, family, tmp_path / "run")
    assert records() == whole


def test_two_ranks_refit_and_learn_together(model: Path, tmp_path: Path) -> None:
    config = variant(tmp_path, ROUTER, LEARNED, num_steps=3)
    options = [f"--model.name={model}", "--model.group_size=16", f"--trainer.default_root_dir={tmp_path}"]
    two = [*TWO_RANKS, "--data.batch_size=1"]
    done = run(["fit", "--config", str(config), *options, *small_data(config), *QUIET, *two])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / WEIGHTS).is_file()


def test_steps_in_an_order_that_cannot_work_are_refused(model: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    steps = config["trainer"]["callbacks"]
    learned = next(each for each in steps if each["class_path"].endswith(LEARNED))
    config["trainer"]["callbacks"] = [learned, *(each for each in steps if each is not learned)]
    path = tmp_path / "moequant_order.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="put GPTQ before LearnedRounding"):
        fit(path, model, tmp_path / "run")


def test_a_router_cannot_be_refitted_inside_a_single_pass(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="so a router cannot be refitted"):
        fit(variant(tmp_path, ROUTER), model, tmp_path / "run", "--model.sequential=block")
