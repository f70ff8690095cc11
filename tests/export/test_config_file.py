"""The configuration of an export is the source's, in its order and dialect, with what changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.quantizer import OPENING
from moeq.export.config_file import edited_config, unfounded_draft
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.moeq_format import write_checkpoint
from moeq.export.origin import Origin
from moeq.models.rotation import untie
from tests.export.rounding import round_model
from tests.tiny import save_tiny, tiny_model


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of a folder's configuration in place (``...`` removes one); returns all of it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=4))
    return config


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source as older versions of transformers wrote it, with a key that nobody knows."""
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("config") / "model")
    edit(
        folder, rope_parameters=..., dtype=..., layer_types=..., num_local_experts=..., rope_theta=500000.0,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        torch_dtype="bfloat16", num_experts=8, transformers_version="4.51.0", my_private_key={"ä": 1e-06},
    )  # fmt: skip
    return folder


def test_a_dense_export_has_the_configuration_of_its_source_to_the_byte(version_4: Path, tmp_path: Path) -> None:
    write_dense(held(load_model(str(version_4))), None, tmp_path / "dense")
    assert (tmp_path / "dense/config.json").read_bytes() == (version_4 / "config.json").read_bytes()
    ids = torch.arange(24).view(2, 12)
    logits = [AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (version_4, tmp_path / "dense")]
    assert torch.equal(*logits)


def test_a_packed_export_adds_keys_behind_those_of_its_source(version_4: Path, tmp_path: Path) -> None:
    model = load_model(str(version_4))
    write_checkpoint(model, None, round_model(model), tmp_path / "packed", metadata={})
    source, packed = config_of(version_4), config_of(tmp_path / "packed")
    assert list(packed) == [*source, "transformers_weights", "quantization_config"]
    assert {key: packed[key] for key in source} == source
    assert packed["quantization_config"]["quant_method"] == "moeq"
    assert packed["transformers_weights"] == OPENING
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert reopened.config.rope_parameters["rope_theta"] == 500000.0
    assert reopened.config.rope_parameters["factor"] == 4.0


def test_a_model_without_files_gets_the_configuration_that_transformers_writes(tmp_path: Path) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    write_dense(held(model), None, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    (report,) = Origin().fallbacks()
    assert report.reason == "source without files"


def test_a_head_that_was_untied_is_announced(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path / "model", tie_word_embeddings=True)
    source = config_of(folder)
    model = load_model(str(folder))
    untie(model)
    write_dense(held(model), None, tmp_path / "dense")
    assert config_of(tmp_path / "dense") == source | {"tie_word_embeddings": False}
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert reopened.lm_head.weight is not reopened.model.embed_tokens.weight


def test_another_dtype_is_said_in_every_key_that_says_one(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "model", num_hidden_layers=1)
    source = edit(folder, torch_dtype="bfloat16")
    write_dense(held(load_model(str(folder), "float32")), None, tmp_path / "dense")
    assert config_of(tmp_path / "dense") == source | {"dtype": "float32", "torch_dtype": "float32"}
    source = edit(folder, torch_dtype=..., dtype=...)
    write_dense(held(load_model(str(folder))), None, tmp_path / "unsaid")
    assert config_of(tmp_path / "unsaid") == source | {"dtype": "bfloat16"}


def test_what_a_source_says_of_its_own_quantization_and_files_is_taken_away() -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    text = {"model_type": "olmoe", "dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    source = {"a": 1, "text_config": text, "compression_config": {}, "transformers_weights": "other.safetensors"}
    edited = edited_config(source, model, Origin())
    assert edited == {"a": 1, "text_config": {"model_type": "olmoe", "dtype": "float32"}}
    assert "quantization_config" in text, "the values that were given are not changed"


@pytest.mark.parametrize("num_draft", [0, 3])
def test_draft_layers_are_announced_where_they_are_there(num_draft: int) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    source = {"dtype": "float32", "num_nextn_predict_layers": 1, "use_mtp": True, "text_config": {"num_mtp_layers": 2}}
    edited = edited_config(source, model, Origin(num_draft=num_draft))
    if num_draft:
        assert edited == source
    else:
        assert edited == {
            "dtype": "float32", "num_nextn_predict_layers": 0, "use_mtp": False, "text_config": {"num_mtp_layers": 0},
        }  # fmt: skip


def test_an_announcement_without_layers_is_reported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_mtp_layers": 2, "num_nextn_predict_layers": 0}))
    (report,) = unfounded_draft(Origin(tmp_path))
    assert "num_mtp_layers: 2 in the source" in report.detail
    assert unfounded_draft(Origin(tmp_path, num_draft=1)) == []
    assert unfounded_draft(Origin(tmp_path, left_out={"mtp.norm.weight": "draft layers left out"})) == []
    assert unfounded_draft(Origin()) == []


def test_the_configuration_in_memory_reads_the_same_from_source_and_export(version_4: Path, tmp_path: Path) -> None:
    model = load_model(str(version_4))
    write_checkpoint(model, None, round_model(model), tmp_path / "packed", metadata={})
    source, packed = (AutoConfig.from_pretrained(each).to_dict() for each in (version_4, tmp_path / "packed"))
    assert {key: value for key, value in packed.items() if key in source and key != "_name_or_path"} == {
        key: value for key, value in source.items() if key != "_name_or_path"
    }
