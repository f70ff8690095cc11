import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from moeq.checkpoint.names import (
    check_expressible,
    dense_conversions,
    dense_weight,
    expert_leaves,
    packed_conversions,
    weight_names,
)
from moeq.models.experts import expert_modules
from tests.tiny import tiny_model

CANONICAL = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def meta_model(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES))


@pytest.mark.parametrize(
    ("family", "leaves"),
    [("mixtral", MIXTRAL), ("phimoe", MIXTRAL), ("olmoe", CANONICAL), ("granitemoe", CANONICAL)],
)
def test_file_names_of_experts_come_from_the_conversions_of_the_family(family: str, leaves: dict[str, str]) -> None:
    assert expert_leaves(meta_model(family)) == leaves


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "granitemoe"])
def test_packed_names_survive_saving_and_loading(family: str) -> None:
    model = meta_model(family)
    conversions = packed_conversions(dense_conversions(model), expert_leaves(model))
    path = next(iter(expert_modules(model)))
    for name in (f"{path}.3.{leaf}.weight_packed" for leaf in CANONICAL):
        key = name
        for conversion in reversed(conversions):
            key, _ = conversion.reverse_transform().rename_source_key(key)
        assert (key == name) == (family == "granitemoe")
        for conversion in conversions:
            key, _ = conversion.rename_source_key(key)
        assert key == name


def test_converters_of_dense_linears_pass_over_single_experts() -> None:
    model = tiny_model("minimax_m3_vl")
    converters = packed_conversions(dense_conversions(model), expert_leaves(model))
    found = {}
    for path in ("mlp.", "mlp.shared_experts.", "mlp.experts.3."):
        key = f"model.language_model.layers.0.{path}gate_proj.weight"
        for converter in converters:
            key, _ = converter.rename_source_key(key)
        found[path] = key.rpartition(".layers.0.")[2]
    assert found == {
        "mlp.": "mlp.gate_up_proj.weight", "mlp.shared_experts.": "mlp.shared_experts.gate_up_proj.weight",
        "mlp.experts.3.": "mlp.experts.3.gate_proj.weight",
    }  # fmt: skip


def test_every_projection_of_every_expert_has_a_name() -> None:
    model = tiny_model("qwen2_moe")
    names = weight_names(model)
    assert len(names) == len(set(names))
    assert sum(".experts." in name for name in names) == 2 * 8 * 3
    assert "model.layers.0.self_attn.q_proj" in names
    assert "model.layers.1.mlp.shared_expert.down_proj" in names


def test_names_lead_to_the_parts_of_fused_parameters() -> None:
    model = tiny_model("deepseek_v3")
    experts = expert_modules(model)
    fused = experts["model.layers.1.mlp.experts"]
    gate = dense_weight(model, "model.layers.1.mlp.experts.5.gate_proj", experts)
    assert torch.equal(gate, fused.gate_up_proj[5, :32])
    assert torch.equal(dense_weight(model, "model.layers.1.mlp.experts.5.up_proj", experts), fused.gate_up_proj[5, 32:])
    assert torch.equal(dense_weight(model, "model.layers.1.mlp.experts.5.down_proj", experts), fused.down_proj[5])
    assert dense_weight(model, "model.layers.0.mlp.up_proj", experts).shape == (64, 64)


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "model.layers.1.mlp.experts.8.up_proj", "model"])
def test_an_unknown_name_is_refused(name: str) -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match="is not a linear of Qwen3MoeForCausalLM"):
        dense_weight(model, name, expert_modules(model))


def test_names_lead_to_the_rows_of_transposed_and_alternating_experts() -> None:
    model = tiny_model("gpt_oss")
    experts = expert_modules(model)
    fused = experts["model.layers.1.mlp.experts"]
    for leaf, first in (("gate_proj", 0), ("up_proj", 1)):
        weight = dense_weight(model, f"model.layers.1.mlp.experts.5.{leaf}", experts)
        assert torch.equal(weight, fused.gate_up_proj[5, :, first::2].T)
    assert torch.equal(dense_weight(model, "model.layers.1.mlp.experts.5.down_proj", experts), fused.down_proj[5].T)


def test_experts_that_cannot_be_taken_apart_are_refused_with_the_reason() -> None:
    model = tiny_model("mixtral")
    model.get_submodule("model.layers.0.mlp.experts").has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"mixtral is not supported because .* has a norm after each expert"):
        check_expressible(model)
