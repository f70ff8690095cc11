"""Files of every family are opened by llama.cpp, which computes what transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.formats.convert import convert
from moeq.formats.gguf_families import FAMILIES
from moeq.formats.gguf_wrappers import WRAPPERS
from tests.formats.gguf_models import IDS, Grid, divergence, transformers_logits, write_dense, write_packed
from tests.formats.llama_cpp import LlamaCpp, needs_llama_cpp

pytestmark = needs_llama_cpp
Values = dict[str, Any]

_YARN: Values = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
# Its queries grow with their position: once in 16 here.
_MISTRAL: Values = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                    "max_position_embeddings": 512}  # fmt: skip
_QWEN4: Values = {
    "layer_types": ["linear_attention", "full_attention"], "output_gate_type": "sigmoid", "indexer_n_heads": 32,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "ple_layer_ids": [1], "heads_per_ngram": 4, "ngram_vocab_size_base": 50, "split_ngram_parts": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
# Two heads of an indexer give many tokens a score of 0 alike, of which each runtime takes others.
_DOTS3: Values = {
    "index_n_heads": 32, "index_head_dim": 64, "index_topk": 8, "sliding_window": 8, "n_group": 1,
    "layer_types": ["indexed_attention", "sliding_attention"], "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_head_dim": 40,
    "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 8,
}  # fmt: skip


def _of_kinds(full: float, sliding: float, turned: float = 1.0) -> Values:
    """Rotary bases of blocks without and with a window."""
    kinds = {"full_attention": full, "sliding_attention": sliding}
    parts = {"rope_type": "default", "partial_rotary_factor": turned}
    return {kind: {**parts, "rope_theta": base} for kind, base in kinds.items()}


# What differs from ``tests.families``: options that llama.cpp computes with.
OPTIONS: dict[str, Values] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "internvl": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "dots1": {"num_key_value_heads": 4},
    # llama.cpp normalizes queries and keys of the delta rule with the epsilon of the norms, transformers with 1e-6.
    "kimi_linear": {"q_lora_rank": None, "rms_norm_eps": 1e-6},
    "mimo_v2_flash": {"rope_parameters": _of_kinds(5e6, 1e4, 0.5)},
    "mellum": {"sliding_window": 8, "layer_types": _WINDOWS[2:], "rope_parameters": _of_kinds(1e4, 1e4)},
    "mistral4": {"rope_parameters": _MISTRAL},
    "mistral3": {"rope_parameters": _MISTRAL},
    "deepseek_ocr2": {"num_key_value_heads": 4},
    # Two heads give many tokens a score of 0 alike, of which each runtime takes others.
    "deepseek_v32": {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 8},
    "glm_moe_dsa": {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 8},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": _QWEN4,
    "glm5_next": {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 8},
    "granitemoe_swa": {"sliding_window": 8},
    # The norm of lightning attention has an epsilon of 1e-6 in transformers, llama.cpp has one for all norms.
    "minimax": {"rms_norm_eps": 1e-6},
    "dots3_note_text": _DOTS3,
    "dots3_note": _DOTS3,
    "deepseek_v4": {
        "index_n_heads": 32,
        "index_head_dim": 64,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
    # llama.cpp normalizes queries and latents with the epsilon of the other norms, transformers with 1e-6.
    "hy_v4": {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 8, "rms_norm_eps": 1e-6},
    "afmoe": {"num_hidden_layers": 4, "layer_types": _WINDOWS, "mup_enabled": True, "route_scale": 2.0},
}
# Further options that change what is written or how it is computed.
VARIANTS: tuple[tuple[str, Values], ...] = (
    ("mixtral", {"tie_word_embeddings": True, "head_dim": 32}),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("qwen2_moe", {"tie_word_embeddings": True, "qkv_bias": False}),
    ("olmoe", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"rope_parameters": _YARN}),
    ("deepseek_v2", {"q_lora_rank": None, "num_hidden_layers": 26, "n_routed_experts": 2, "n_group": 1}),
    ("deepseek_v2", {"routed_scaling_factor": 2.0, "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    ("deepseek_v3", {"n_group": 1, "norm_topk_prob": False}),
    ("granitemoe", {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1,
                    "logits_scaling": 2.0}),
    ("gpt_oss", {"rope_parameters": _YARN}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    ("ernie4_5_moe", {"tie_word_embeddings": False, "moe_num_shared_experts": 0}),
    ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0,
                                            "factor": 1.0}}),
    ("minimax_m2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    ("mellum", {"tie_word_embeddings": True, "rope_parameters": _of_kinds(1e4, 1e4) | {"full_attention": _YARN}}),
    ("mimo_v2_flash", {"num_hidden_layers": 4, "v_head_dim": 32, "layer_types": _WINDOWS[1:] + _WINDOWS[:1],
                       "sliding_window": 8, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    ("cohere2_moe", {"num_shared_experts": 2, "expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("cohere2_moe", {"num_hidden_layers": 3, "sliding_window": 8, "layer_types": _WINDOWS[1:], "num_shared_experts": 1,
                     "mlp_layer_types": ["dense", "sparse", "sparse"], "prefix_dense_intermediate_size": 96}),
    ("nemotron_h", {"moe_latent_size": None, "n_groups": 2, "norm_topk_prob": False, "n_shared_experts": 2}),
    ("kimi_linear", {"num_hidden_layers": 3, "tie_word_embeddings": True,
                     "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                     "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    ("qwen3_5_moe_text", {"linear_num_value_heads": 8, "tie_word_embeddings": True}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0, "sliding_window": 8}),
    ("gemma4", {"hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_global_key_value_heads": 1,
                "attention_k_eq_v": True, "final_logit_softcapping": 30.0, "num_hidden_layers": 4,
                "layer_types": _WINDOWS, "sliding_window": 8}),
    ("glm4v_moe", {"routed_scaling_factor": 2.0, "norm_topk_prob": False}),
    ("laguna", {"num_hidden_layers": 5, "layer_types": _WINDOWS[3:] + _WINDOWS[:3] + _WINDOWS[3:], "sliding_window": 8,
                "mlp_layer_types": ["dense"] + ["sparse"] * 4, "num_attention_heads_per_layer": [4, 8, 8, 8, 4],
                "gating": "per-element", "moe_routed_scaling_factor": 2.0}),
    ("laguna", {"rope_parameters": {"full_attention": {**_YARN, "partial_rotary_factor": 0.5}}}),
    ("granitemoe_swa", {"layer_rope_theta": [10000.0, 0], "embedding_multiplier": 3.0, "residual_multiplier": 0.3,
                        "attention_multiplier": 0.1, "logits_scaling": 2.0}),
    ("deepseek_v32", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("glm_moe_dsa", {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"],
                     "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    ("mistral4", {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 2.0,
                  "first_k_dense_replace": 0}),
    ("qwen4_exp_text", {"num_hidden_layers": 4, "ple_layer_ids": [3], "ngram_size": 5, "ple_conv_kernel_size": 3,
                        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]}),
    ("qwen4_exp_text", {"ple_layer_ids": [], "hc_count": 3, "linear_num_value_heads": 8, "tie_word_embeddings": True,
                        "indexer_head_dim": 32, "indexer_compress_ratio": 4, "indexer_budget": 12}),
    ("qwen4_exp_text", {"rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}}),
    ("glm5_next", {"num_hidden_layers": 5, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 3, "n_shared_experts": 2,
                   "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention",
                                   "full_attention"],
                   "indexer_types": ["full", "full", "shared", "full", "full"]}),
    ("glm5_next", {"swiglu_limit": 0.3, "linear_lower_bound": None, "n_group": 2, "index_kpool": 4, "index_topk": 12}),
    ("glm5_next", {"linear_lower_bound": -2.0, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
                   "hc_sinkhorn_iters": 3, "hc_eps": 1e-3, "v_head_dim": 32, "qk_nope_head_dim": 48,
                   "kv_lora_rank": 24, "q_lora_rank": 40, "linear_head_dim": 32}),
    ("deepseek_ocr2", {"routed_scaling_factor": 2.0, "n_shared_experts": 2, "num_experts_per_tok": 3}),
    ("deepseek_v4", {"swiglu_limit": 0.3, "hc_sinkhorn_iters": 5, "hc_eps": 1e-2, "o_groups": 4, "sliding_window": 8,
                     "routed_scaling_factor": 3.0, "tie_word_embeddings": True, "index_head_dim": 128}),
    ("deepseek_v4", {"num_hidden_layers": 2, "mlp_layer_types": ["moe", "moe"], "partial_rotary_factor": 0.5,
                     "layer_types": ["compressed_sparse_attention"] * 2,
                     "rope_parameters": {**_YARN, "attention_factor": 1.0}}),
    ("hy_v4", {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"], "swiglu_limit": 0.3, "hc_mult": 3,
               "mlp_layer_types": ["dense", "dense", "sparse"], "hc_magnitude": 1.3, "hc_eps": 1e-2}),
    ("hy_v4", {"mlp_layer_types": ["sparse", "sparse"], "n_group": 2, "norm_topk_prob": False, "n_shared_experts": 2,
               "tie_word_embeddings": True, "rope_parameters": _YARN, "v_head_dim": 32, "qk_nope_head_dim": 48}),
    ("granitemoehybrid", {"position_embedding_type": "rope", "mamba_n_groups": 2}),
    ("minimax", {"num_hidden_layers": 4, "tie_word_embeddings": True, "head_dim": 32, "full_attn_alpha_factor": 2.0,
                 "linear_attn_alpha_factor": 2.0, "mlp_alpha_factor": 2.0, "rope_parameters": _YARN,
                 "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]}),
    ("bailing_hybrid", {"n_group": 2, "num_hidden_layers": 3, "head_dim": 32, "kda_lower_bound": -2.0,
                        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
                        "mlp_layer_types": ["dense", "dense", "sparse"], "rope_parameters": _YARN}),
    ("bailing_hybrid", {"tie_word_embeddings": True, "n_shared_experts": 2, "norm_topk_prob": False,
                        "mlp_layer_types": ["sparse", "sparse"], "short_conv_kernel_size": 3,
                        "qk_rope_head_dim": 8, "v_head_dim": 32, "partial_rotary_factor": 0.5}),
    ("dots3_note_text", {"num_hidden_layers": 4, "n_group": 2, "routed_scaling_factor": 2.0, "norm_topk_prob": False,
                         "layer_types": ["sliding_attention", "indexed_attention"] * 2, "n_shared_experts": 2,
                         "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}),
    ("dots3_note_text", {"index_head_dim": 128, "index_topk": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
                         "mlp_layer_types": ["sparse", "sparse"]}),
    ("exaone_moe", {"sliding_window": 8, "num_hidden_layers": 4, "layer_types": _WINDOWS[1:] + _WINDOWS[:1],
                    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
)  # fmt: skip
_QUICK = ("mixtral", "deepseek_v3", "qwen3_vl_moe")
# Tokens of the prompt before others are read one by one, beside what was kept of those before.
_PROMPT = 13
# llama.cpp reads this function of two families off a table in float16, whose steps others make elsewhere.
_BY_TABLE = ("gemma4", "gemma4_text")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in _QUICK else pytest.mark.slow) for name in (*FAMILIES, *WRAPPERS)]
)
def test_every_family_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    _compare(family, OPTIONS.get(family, {}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_options_that_a_file_can_say_are_computed(family: str, options: Values, tmp_path: Path) -> None:
    _compare(family, OPTIONS.get(family, {}) | options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_what_is_written_after_a_prompt_looks_back_as_in_transformers(family: str, tmp_path: Path) -> None:
    """Beyond two compressed keys of 128 tokens, windows, and what an indexer chooses."""
    ids = torch.randint(1, 257, (300,), generator=torch.Generator().manual_seed(5))
    source, path = write_dense(family, tmp_path, **OPTIONS[family])
    theirs = transformers_logits(source, ids)
    file = LlamaCpp(path)
    found = file.logits(ids, prompt=130)
    file.close()
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=0)


def _compare(family: str, options: Values, folder: Path) -> None:
    source, path = write_dense(family, folder, **options)
    theirs = transformers_logits(source, by_table=family in _BY_TABLE)
    file = LlamaCpp(path)
    found, stepped = file.logits(IDS), file.logits(IDS, prompt=_PROMPT)
    file.close()
    # Float rounding: logits of these models reach 5, and a wrong order of rows or a key left out moves them by 1.
    torch.testing.assert_close(found[0], theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, theirs, atol=2e-3 if family in _BY_TABLE else 1e-4, rtol=0)
    torch.testing.assert_close(stepped, theirs, atol=2e-3 if family in _BY_TABLE else 1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen4_exp_text", {"indexer_budget": 64}), ("glm5_next", {"index_topk": 64})],
)
def test_what_stays_in_bfloat16_is_computed(family: str, options: Values, tmp_path: Path) -> None:
    """llama.cpp ends where it has no operation on a type.

    All experts and tokens are taken, so that roundings decide nothing.
    """
    some = ("layers.0.mlp.up_proj", "layers.0.linear_attn.in_proj_z")
    options = {**OPTIONS[family], **options, "num_experts_per_tok": 8}
    export, _ = write_packed(family, tmp_path, lambda name: (8, 32, True) if name.endswith(some) else None, **options)
    convert(export, "gguf", tmp_path / "gguf")
    file = LlamaCpp(tmp_path / "gguf" / "model.gguf")
    found = file.logits(IDS)
    file.close()
    assert divergence(transformers_logits(export), found) < 1e-3


@pytest.mark.parametrize(
    ("grid", "carrier", "kind"),
    [
        ((1, 128, True), "exact", "Q1_0"),
        ((2, 64, True), "exact", "Q2_0"),
        ((3, 32, False), "exact", "Q4_0"),
        pytest.param((4, 32, True), "exact", "Q4_0", marks=pytest.mark.slow),
        pytest.param((4, None, False), "exact", "Q5_0", marks=pytest.mark.slow),
        pytest.param((8, 64, True), "exact", "Q8_0", marks=pytest.mark.slow),
        pytest.param((4, 32, False), "native", "Q4_1", marks=pytest.mark.slow),
        pytest.param((5, 32, False), "native", "Q5_1", marks=pytest.mark.slow),
    ],
)
def test_quantized_files_are_read_as_the_codes_that_were_solved(
    grid: Grid, carrier: str, kind: str, tmp_path: Path
) -> None:
    options = {
        "moe_intermediate_size": 128,
        "hidden_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_hidden_layers": 1,
    }
    export, _ = write_packed("qwen2_moe", tmp_path, lambda name: grid, **options)
    report = convert(export, "gguf", tmp_path / "gguf", carrier=carrier)
    assert report.types[kind] == report.num_quantized
    file = LlamaCpp(tmp_path / "gguf" / "model.gguf")
    found, same, original = file.logits(IDS), transformers_logits(export), transformers_logits(tmp_path / "source")
    file.close()
    # llama.cpp rounds activations to 8 bits, and the embedding and head stay in bfloat16.
    assert divergence(same, found) < 0.01
    assert divergence(original, same) > 3 * divergence(same, found) or kind == "Q8_0"
