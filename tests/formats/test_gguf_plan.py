"""Every tensor of a model has a place in its file, or the model is refused by name before anything is written."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import weight_names
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.formats.gguf import FORMAT
from moeq.formats.gguf_families import FAMILIES
from moeq.formats.gguf_metadata import common
from moeq.formats.gguf_plan import find_family, plan_file
from moeq.formats.gguf_rope import rope
from moeq.formats.gguf_wrappers import WRAPPERS
from tests.families import FAMILIES as ALL
from tests.families import WRAPPERS as ALL_WRAPPERS
from tests.formats.test_gguf_runs import OPTIONS
from tests.tiny import tiny_config

_DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
# Decays of lightning attention, which llama.cpp computes from the numbers of heads and blocks.
_COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
Q4, Q3, Q8 = PackedFormat(4, 32, True), PackedFormat(3, 32, False), PackedFormat(8, 32, True)


def empty(family: str, **overrides: Any) -> Any:
    config = tiny_config(family, **(OPTIONS.get(family, {}) | overrides))
    with torch.device("meta"):
        return model_class(config).from_config(config, dtype=torch.bfloat16)


def grids(model: Any, of: dict[str, PackedFormat | None]) -> dict[str, PackedFormat]:
    """A grid for each weight of the blocks: that of the first ending of ``of`` that fits."""
    found = {}
    for name in weight_names(model):
        grid = next((grid for ending, grid in of.items() if name.endswith(ending)), None)
        if grid is not None and ".layers." in name:
            found[name] = grid
    return found


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_no_tensor_is_left_out_and_none_written_twice(family: str) -> None:
    """Of a wrapper those of the language model and its head."""
    model = empty(family)
    plan = plan_file(model, {}, "exact")
    names = [each.name for each in plan]
    assert len(names) == len(set(names))
    # What divides the frequencies of Gemma 4's rotary embedding is no tensor of the model.
    written = sum(torch.Size(each.stored.shape).numel() for each in plan if each.name != "rope_freqs.weight")
    parts = model.get_decoder().state_dict(), model.get_output_embeddings().state_dict()
    keys = tuple(find_family(model).numbers)  # of the file, and no tensors of it
    tensors = [tensor for part in parts for name, tensor in part.items() if not name.endswith((*_COMPUTED, *keys))]
    assert written == sum(tensor.numel() for tensor in tensors) - _tied(model)


def _tied(model: Any) -> int:
    return model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0


@pytest.mark.parametrize("family", sorted({*ALL, *ALL_WRAPPERS} - {*FAMILIES, *WRAPPERS}))
def test_a_family_that_was_not_run_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=rf"gguf: {family}( \(\w+\))? is no family whose files were run "):
        FORMAT.check(empty(family), {}, "exact")


def test_a_wrapper_of_another_language_model_is_refused() -> None:
    config = tiny_config("internvl")
    config.text_config = tiny_config("mixtral")
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"gguf: internvl \(mixtral\) is no family whose files were run"):
        FORMAT.check(model, {}, "exact")


def test_types_are_those_of_the_grids_and_of_what_is_kept() -> None:
    model = empty("mixtral")
    of = {"0.self_attn.q_proj": Q8, "_proj": Q4}
    kinds = {each.name: each.stored.kind for each in plan_file(model, grids(model, of), "exact")}
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.1.ffn_gate_exps.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"


def test_experts_of_one_projection_share_their_type_not_their_grid() -> None:
    model = empty("mixtral")
    mixed = grids(model, {"0.gate_proj": Q3, "_proj": Q4})
    stacks = [each for each in plan_file(model, mixed, "exact") if "exps" in each.name]
    assert {each.stored.kind for each in stacks} == {"Q4_0"}
    for other in (Q8, None):
        wrong = grids(model, {"experts.3.gate_proj": other, "_proj": Q4})
        with pytest.raises(ValueError, match=r"layers.0.mlp.experts.gate_proj are one tensor .* runtime: llama.cpp"):
            FORMAT.check(model, wrong, "exact")


def test_columns_in_another_order_take_no_group_apart() -> None:
    model = empty("qwen3_5_moe_text")  # heads of values are 16 wide
    FORMAT.check(model, grids(model, {"linear_attn.out_proj": PackedFormat(4, None, True)}), "exact")
    with pytest.raises(ValueError, match=r"linear_attn.out_proj: .* takes groups of 32 apart; halve them"):
        FORMAT.check(model, grids(model, {"linear_attn.out_proj": Q4}), "exact")


def test_a_grid_without_a_type_names_its_weight() -> None:
    model = empty("mixtral")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.k_proj: gguf has no type that holds 4 bits"):
        FORMAT.check(model, grids(model, {"k_proj": PackedFormat(4, 16, True), "_proj": Q4}), "exact")


_YARN_OF_LESS = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_TURNED = _DEFAULT | {"partial_rotary_factor": 0.125}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
_RATES = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe with norm_topk_prob: False, and this model has True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: True"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("mixtral", {"sliding_window": 32}, "sliding_window: None, and this model has 32"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act: silu"),
        ("dots1", {"layer_types": ["full_attention", "sliding_attention"]}, "without windows"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"num_key_value_heads": 2}, "heads share them"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "group_limited_greedy"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "windows in all blocks but one in 2"),
        ("ernie4_5_moe", {"num_hidden_layers": 3, "moe_layer_end_index": 1}, "the last block has experts"),
        ("lfm2_moe", {"routed_scaling_factor": 2.0}, "routed_scaling_factor: 1.0"),
        ("afmoe", {"mup_enabled": False}, "mup_enabled"),
        ("kimi_linear", {"moe_renormalize": False}, "moe_renormalize: True"),
        ("mimo_v2_flash", {"norm_topk_prob": False}, "norm_topk_prob: True"),
        ("mellum", {"rope_parameters": None}, "one rotary base"),
        ("gemma4", {"vocab_size_per_layer_input": 128}, "vocab_size_per_layer_input"),
        ("gemma4", {"layer_types": ["full_attention"] * 2}, "a window in some blocks"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "attention to what came before"),
        (
            "gemma4_text", {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _DEFAULT)},
            "proportional rotary positions",
        ),
        ("deepseek_v32", {"index_head_dim": 32}, "multiples of 64, and here they are 32 wide"),
        ("deepseek_v32", {"index_head_dim": 64, "rope_parameters": _YARN_OF_LESS}, "mscale_all_dim: 1, and here"),
        ("mistral4", {"rope_parameters": _YARN_OF_LESS}, "mscale_all_dim: 1, and here it is 0.7"),
        ("glm_moe_dsa", {"rope_parameters": _YARN_OF_LESS}, "rotary positions without scaling"),
        ("deepseek_ocr2", {"num_key_value_heads": 2}, "heads share them"),
        ("qwen3_omni_moe_thinker", {"norm_topk_prob": False}, "norm_topk_prob: True"),
        ("laguna", {"layer_types": ["sliding_attention", "full_attention"]}, "the first of four"),
        ("granitemoe_swa", {"layer_rope_theta": [1e4, 5e4]}, "one rotary base"),
        ("granitemoe_swa", {"shared_intermediate_size": 32}, "shared_intermediate_size: 0"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}, "shared_expert_combination_strategy"),
        ("qwen4_exp_text", {"output_gate_type": None}, "output_gate_type: sigmoid, and this model has None"),
        ("qwen4_exp_text", {"layer_types": ["full_attention"] * 2, "ple_layer_ids": []}, "delta rule beside blocks of"),
        ("qwen4_exp_text", {"linear_value_head_dim": 32}, "of one width, and here they are 16 and 32 wide"),
        ("qwen4_exp_text", {"indexer_compress_ratio": 1}, "blocks of two tokens or more"),
        ("qwen4_exp_text", {"layer_types": ["linear_attention"] * 2 + ["full_attention"], "num_hidden_layers": 3,
                            "ple_layer_ids": [1, 2]}, "n-grams in one block"),
        ("qwen4_exp_text", {"ple_embed_dim": 32}, "as wide as the residual stream, and here they are 32 wide"),
        ("qwen4_exp_text", {"ngram_size": 9, "heads_per_ngram": 2}, "n-grams of 8 tokens at most"),
        ("glm5_next", {"layer_types": ["full_attention"] * 2}, "delta rule beside blocks of attention"),
        ("glm5_next", {"linear_num_heads": 8}, "as many heads of the delta rule as of attention"),
        ("glm5_next", {"hc_mult": 3}, "four residual streams, and here they are 3"),
        ("glm5_next", {"index_kpool": 1}, "pools of two tokens or more"),
        ("glm5_next", {"index_kpool_always_select_tail": False}, "last tokens that are no whole pool"),
        ("glm5_next", {"mlp_layer_types": ["sparse", "dense"]}, "dense blocks before all mixtures"),
        ("minimax", {"layer_types": ["full_attention"] * 2}, "full attention in some blocks and linear"),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"]}, "full attention in the last block"),
        ("minimax", {"mlp_beta_factor": 0.5}, "mlp_beta_factor: 1, and this model has 0.5"),
        ("minimax", {"mlp_alpha_factor": 2.0}, "one factor of what attention and experts are added to"),
        ("minimax", {"rotary_dim": 8}, "rotary positions of whole heads"),
        ("minimax", {"sliding_window": 8}, "sliding_window: None"),
        ("bailing_hybrid", {"layer_types": ["full_attention"] * 2}, "full attention in some blocks and linear"),
        ("bailing_hybrid", {"kda_safe_gate": False}, "kda_safe_gate: True"),
        ("bailing_hybrid", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06, and this model has 1e-05"),
        ("bailing_hybrid", {"mlp_layer_types": ["sparse", "dense"]}, "blocks without experts at the beginning alone"),
        ("bailing_hybrid", {"rope_parameters": _YARN_OF_LESS}, "the magnitude of yarn without mscale"),
        ("dots3_note_text", {"layer_types": ["indexed_attention"] * 2}, "an indexer in some blocks and a window in"),
        ("dots3_note_text", {"swa_q_lora_rank": 16}, "queries of one rank and one number of turned dimensions"),
        ("dots3_note_text", {"swa_qk_nope_head_dim": 32}, "queries of one rank and one number of turned dimensions"),
        ("dots3_note_text", {"index_head_dim": 32}, "multiples of 64, and here they are 32 wide"),
        ("dots3_note_text", {"shared_experts_intermediate_size": 64}, "shared experts as wide as the others"),
        ("dots3_note_text", {"mlp_layer_types": ["sparse", "dense"]}, "blocks without experts at the beginning alone"),
        ("dots3_note", {"rope_parameters": dict.fromkeys(("indexed_attention", "sliding_attention"), _YARN_OF_LESS)},
         "rotary positions without scaling"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"]}, "every so-manieth block"),
        ("deepseek_v4", {"layer_types": ["heavily_compressed_attention"] * 3}, "an indexer in some block"),
        ("deepseek_v4", {"compress_rates": _RATES}, "and here some are of 8 tokens"),
        ("deepseek_v4", {"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "bound to tokens in the first blocks alone"),
        ("deepseek_v4", {"index_head_dim": 32}, "multiples of 64, and here they are 32 wide"),
        ("deepseek_v4", {"hc_mult": 2}, "hc_mult: 4, and this model has 2"),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, "scoring_func: sqrtsoftplus, and this model has sigmoid"),
        ("deepseek_v4", {"rope_parameters": {"main": _TURNED, "compress": _TURNED | _YARN_OF_LESS}}, "it is None"),
        ("deepseek_v4", {"rope_parameters": {"main": _TURNED, "compress": _TURNED | _LINEAR}}, "scaling, or with yarn"),
        ("deepseek_v4", {"rope_parameters": {"main": _TURNED, "compress": _DEFAULT}}, "as many turned dimensions"),
        ("hy_v4", {"mlp_layer_types": ["sparse", "dense"]}, "without experts at the beginning alone"),
        ("hy_v4", {"swiglu_limit": 0.0}, "limited by more than 0, and here by 0.0"),
        ("deepseek_v4", {"swiglu_limit": -1.0}, "limited by more than 0, and here by -1.0"),
        ("hy_v4", {"rope_parameters": {**_YARN_OF_LESS, "mscale": None}}, "without a magnitude of yarn"),
        (
            "mixtral", {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "kind dynamic",
        ),
    ],
)  # fmt: skip
def test_an_option_that_llama_cpp_computes_otherwise_is_refused(
    family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"gguf: .*{message}.*export moeq or dense"):
        FORMAT.check(empty(family, **options), {}, "exact")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention_factor": 2.0}, "attention_factor: 1.13863, and this model has 2"),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, "without mscale"),
        ({"truncate": False}, "rounds the range of yarn"),
        ({"beta_slow": 0.5}, "beta_fast: 32 and beta_slow: 1, whatever a file says, and this model has 32 and 0.5"),
    ],
)
def test_a_yarn_that_llama_cpp_computes_otherwise_is_refused(more: dict[str, Any], message: str) -> None:
    config = tiny_config("qwen3_moe")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config.rope_parameters = {**yarn, "attention_factor": 1.1386294}
    assert rope(config, 16)["rope.scaling.factor"] == 4.0
    config.rope_parameters = yarn | more
    with pytest.raises(ValueError, match=message):
        rope(config, 16)


def test_a_yarn_of_deepseek_needs_its_two_magnitudes_to_be_equal() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for more in ({}, {"mscale": 1.0, "mscale_all_dim": 0.7}):
        with pytest.raises(ValueError, match="mscale equal to mscale_all_dim"):
            FORMAT.check(empty("deepseek_v3", rope_parameters=yarn | more), {}, "exact")


def test_an_odd_number_of_turned_dimensions_is_refused() -> None:
    config = SimpleNamespace(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.35}, rope_scaling=None)
    with pytest.raises(ValueError, match="turns an even number of dimensions of a head, and this model turns 5"):
        rope(config, 16)
    assert rope(config, 24)["rope.dimension_count"] == 8


@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_a_configuration_without_options_of_its_own_has_common_keys(family: str) -> None:
    """Where no block is dense there is no width of these."""
    config = CONFIG_MAPPING[family]().get_text_config()
    assert common(config)["feed_forward_length"] == getattr(config, "intermediate_size", None)


def test_common_keys_are_those_of_the_configuration() -> None:
    found = common(tiny_config("qwen3_moe", head_dim=32))
    assert found["attention.key_length"] == 32
    assert (found["block_count"], found["attention.head_count"], found["attention.head_count_kv"]) == (2, 4, 2)
