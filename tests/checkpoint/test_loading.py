import json
from pathlib import Path

import pytest
import torch

from moeq.checkpoint.configuration import load_config
from moeq.checkpoint.loading import check_finite_weights, load_model, load_tokenizer, model_bytes
from moeq.export.moeq_format import write_checkpoint
from moeq.models.storage import storage_dtype
from tests.export.rounding import round_model
from tests.tiny import save_tiny, tiny_config, tiny_model


def test_a_loaded_model_is_frozen_in_eval_mode_and_has_the_asked_dtype(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path)
    assert load_model(str(folder)).dtype == torch.bfloat16
    model = load_model(str(folder), "float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_non_finite_weight_is_named_and_counted() -> None:
    model = tiny_model("mixtral")
    check_finite_weights(model)
    model.model.layers[0].self_attn.q_proj.weight[0, :2] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight has 2 of 4096 values"):
        check_finite_weights(model)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer found at '.*nothing'"):
        load_tokenizer(str(tmp_path / "nothing"))
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no tokenizer could be read from the folder .* .it holds \['config.json'"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_model_in_float32_has_the_values_of_its_files_and_twice_their_bytes(tmp_path: Path) -> None:
    folder = str(save_tiny("qwen3_moe", tmp_path))
    stored, wide = load_model(folder), load_model(folder, "auto", "float32")
    assert (stored.dtype, wide.dtype, storage_dtype(wide)) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert all(torch.equal(p, wide.get_parameter(name)) for name, p in stored.named_parameters())
    assert not any(parameter.requires_grad for parameter in wide.parameters())
    size = sum(p.nbytes for p in stored.parameters())
    for compute, factor in (("stored", 1), ("float32", 2)):
        assert model_bytes(folder, "auto", compute) == pytest.approx(factor * size, rel=0.1)
    assert load_model(folder, "float32", "stored").dtype == torch.float32


def test_the_bytes_of_a_packed_export_count_its_codes_once(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    quantized = round_model(model)
    write_checkpoint(model, None, quantized, tmp_path / "packed", metadata={})
    wide = load_model(str(tmp_path / "packed"), "auto", "float32")
    size = sum(p.nbytes for p in wide.parameters())
    assert model_bytes(str(tmp_path / "packed"), "auto", "float32") == pytest.approx(size, rel=0.1)


def test_a_dtype_that_is_said_of_the_language_model_alone_is_that_of_the_wrapper(tmp_path: Path) -> None:
    tiny_config("qwen3_vl_moe").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said.pop("dtype", None)
    said["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert load_config(str(tmp_path)).dtype == torch.bfloat16
