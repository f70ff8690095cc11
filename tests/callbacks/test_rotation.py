"""A run with Rotation exports a model of the same family that computes what was quantized, and continues alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from callbacks.rotation import Rotation
from moeq.fit.fingerprint import describe_step
from tests.test_main import fit
from tests.tiny import save_tiny

CONFIG = Path("configs/moequant_rotated_w4.yaml")
WEIGHTS = "export/model.safetensors"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)


def variant(folder: Path, rotation: dict[str, Any] | None, dense: bool = True) -> Path:
    """The configuration with other settings of Rotation (None: without it)."""
    config = yaml.safe_load(CONFIG.read_text())
    first, *others = config["trainer"]["callbacks"]
    assert first["class_path"] == "Rotation"
    for each in others:
        if each["class_path"].endswith("Export"):
            each["init_args"] = {"formats": ["moeq", "dense"] if dense else ["moeq"]}
    config["trainer"]["callbacks"] = others if rotation is None else [{**first, "init_args": rotation}, *others]
    path = folder / f"moequant_w4_{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def finished(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fit(variant(folder, {}), tied, folder / "run", "--model.bits=8")
    return folder / "run"


def test_both_exports_are_verified_untied_and_have_norms_of_ones(finished: Path) -> None:
    verification = json.loads((finished / "verification.json").read_text())
    assert verification["checkpoint"]["logits_equal"]
    assert verification["dense"]["logits_equal"]
    for name in ("export", "dense"):
        config = json.loads((finished / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert config["model_type"] == "qwen2_moe"
        model = AutoModelForCausalLM.from_pretrained(finished / name)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert bool((model.model.norm.weight == 1).all())
        assert bool((model.model.layers[1].input_layernorm.weight == 1).all())


def test_at_eight_bits_the_rotated_export_still_computes_what_the_original_did(finished: Path, tied: Path) -> None:
    ids = torch.arange(1, 60)[None]
    original = AutoModelForCausalLM.from_pretrained(tied)(ids).logits.detach()
    exported = AutoModelForCausalLM.from_pretrained(finished / "export")(ids).logits.detach()
    assert float((exported - original).norm() / original.norm()) < 0.1


def test_the_time_of_the_rotation_is_in_the_manifest(finished: Path) -> None:
    assert json.loads((finished / "manifest.json").read_text())["seconds"]["rotation"] > 0


@pytest.mark.slow
def test_a_run_continues_behind_its_finished_block_on_the_model_rotated_alike(tied: Path, tmp_path: Path) -> None:
    config = variant(tmp_path, {"seed": 3}, dense=False)
    fit(config, tied, tmp_path / "run")
    written = (tmp_path / "run" / WEIGHTS).read_bytes()
    fallbacks = (tmp_path / "run/fallbacks.json").read_text()
    (tmp_path / "run" / "export").rename(tmp_path / "export")
    (tmp_path / "run/blocks/block_001.safetensors").unlink()
    fit(config, tied, tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == written
    assert (tmp_path / "run/fallbacks.json").read_text() == fallbacks


@pytest.mark.parametrize("other", [{"seed": 1}, {"value_output": False}, None])
def test_blocks_of_another_rotation_are_refused(
    other: dict[str, Any] | None, tied: Path, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/blocks").symlink_to(finished / "blocks")
    with pytest.raises(SystemExit, match="blocks of a run with another configuration"):
        fit(variant(tmp_path, other), tied, tmp_path / "run", "--model.bits=8")


def test_a_family_that_cannot_be_rotated_says_so_before_any_work(tmp_path: Path) -> None:
    model = save_tiny("mixtral", tmp_path / "model", hidden_size=92, head_dim=16)
    with pytest.raises(SystemExit, match=r"no Hadamard matrix of size 92 .*choose kind: orthogonal"):
        fit(CONFIG, model, tmp_path / "run", "--model.group_size=null")
    assert not (tmp_path / "run/calibration").exists()


def test_what_it_is_given_enters_the_fingerprint() -> None:
    one, same, other = (describe_step(Rotation(seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
