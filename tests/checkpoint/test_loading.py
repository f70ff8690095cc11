from pathlib import Path

import pytest
import torch

from moeq.checkpoint.loading import check_finite_weights, load_model, load_tokenizer
from tests.tiny import save_tiny, tiny_model


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
