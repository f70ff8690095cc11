"""Every mistake of a user ends with one line that says what was given, what is allowed and what to do."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import run
from tests.test_main import QUIET, fit, validate
from tests.tiny import save_tiny

RTN = Path("configs/rtn_w3.yaml")
TEXT = Path("configs/gptq_text_w3.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("bad") / "model")


def refused(message: str) -> "pytest.RaisesContext[SystemExit]":
    return pytest.raises(SystemExit, match=message)


def left_behind(folder: Path) -> list[str]:
    """Names of exports and blocks in a run folder."""
    return [p.name for p in folder.glob("*") if p.name in ("export", "dense", "blocks", "allocation.json")]


def test_a_dense_model(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "llama")
    with refused("moeq: llama has no routed experts"):
        fit(RTN, dense, tmp_path / "run")
    assert left_behind(tmp_path / "run") == []


def test_a_family_whose_experts_cannot_be_expressed(tmp_path: Path) -> None:
    model = save_tiny("inkling2_text", tmp_path / "inkling2")
    with refused("moeq: inkling2_text cannot be quantized by moeq"):
        fit(RTN, model, tmp_path / "run")


def test_an_unknown_model_path(tmp_path: Path) -> None:
    with refused("no model found at .*nowhere.*check --model.name"):
        fit(RTN, tmp_path / "nowhere", tmp_path / "run")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused(r"no model could be read from the folder .*empty .*give a Hugging Face model folder"):
        fit(RTN, tmp_path / "empty", tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.group_size=24",
            r"group_size \(24\) must divide in_features; it does not divide 64 of .*; choose one",
        ),
        ("--model.bits=1", r"bits \(1\) leave two levels.*set symmetric: true and grid: uniform"),
        ("--model.bits=9", r"bits \(9\) must be between 1 and 8"),
        ("--model.damping=0", r"damping \(0.0\) must lie between 0 and 1"),
        ("--model.affinity_power=-1", r"affinity_power \(-1.0\) must not be negative"),
    ],
)
def test_bits_and_sizes_that_do_not_fit(option: str, message: str, tiny: Path, tmp_path: Path) -> None:
    with refused(message):
        fit(RTN, tiny, tmp_path / "run", option)
    assert left_behind(tmp_path / "run") == []


def test_a_calibration_text_shorter_than_a_window(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with refused(r"calibration text .*short.txt"):
        fit(TEXT, tiny, tmp_path / "run", f"--data.path={text}")
    assert "export" not in left_behind(tmp_path / "run")


def test_a_missing_calibration_text(tiny: Path, tmp_path: Path) -> None:
    with refused("none.txt"):
        fit(TEXT, tiny, tmp_path / "run", f"--data.path={tmp_path / 'none.txt'}")


def test_an_export_that_exists_already(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export/precious.txt").write_text("keep me")
    with refused("export exists and is not empty; set --trainer.default_root_dir"):
        fit(RTN, tiny, tmp_path)
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["precious.txt"]


def test_a_list_of_callbacks_without_a_method(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "rtn_none.yaml"
    config.write_text(RTN.read_text().replace("    - class_path: RTN\n", ""))
    with refused(r"62 of 62 planned weights were not quantized.*put a method such as GPTQ or RTN"):
        fit(config, tiny, tmp_path / "run")
    assert left_behind(tmp_path / "run") == ["allocation.json"]


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_export(damage: str, tiny: Path, tmp_path: Path) -> None:
    fit(RTN, tiny, tmp_path)
    path = tmp_path / "export/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "alter" else content[: len(content) // 2])
    few = ["--model.reference=null", "--data.domains=null", "--data.num_documents=2"]
    with refused("model.safetensors"):
        validate(Path("configs/eval.yaml"), tmp_path / "export", tmp_path / "eval", *few)


def test_a_truncated_original(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with refused("model.safetensors is missing, truncated or damaged"):
        fit(RTN, copy, tmp_path / "run")


def test_nan_weights(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with refused("model.layers.1.mlp.experts.gate_up_proj has 1 of 32768 values that are NaN"):
        fit(RTN, copy, tmp_path / "run")


def test_an_export_is_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    fit(RTN, tiny, tmp_path / "first")
    with refused("quantized export already"):
        fit(RTN, tmp_path / "first/export", tmp_path / "second")


@pytest.mark.parametrize("in_file", [True, False])
def test_a_typo_in_the_configuration(in_file: bool, tiny: Path, tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text("model:\n  bit: 3\n")
    with refused(r"moeq: .*model\.bit"):
        fit(RTN, tiny, tmp_path, *([f"--config={typo}"] if in_file else ["--model.bit=3"]))
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_a_mistake_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = run(["fit", "--config", str(RTN), "--model.name", str(tmp_path / "none"), *QUIET])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("moeq: no model found at")
