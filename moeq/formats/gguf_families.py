"""Families of models whose GGUF files were run in llama.cpp against transformers: names, keys, and what is refused.

A name that is not here is the one that the ``gguf`` package's own table of names gives.  Each
family is run by ``tests/formats/test_gguf_runs.py``; one that was not run is not written.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moeq.formats import gguf_bailing as bailing
from moeq.formats import gguf_dots3 as dots3
from moeq.formats import gguf_gemma as gemma
from moeq.formats import gguf_latent as latent
from moeq.formats import gguf_lightning as lightning
from moeq.formats import gguf_mamba as mamba
from moeq.formats import gguf_metadata as keys
from moeq.formats import gguf_qwen4 as qwen4
from moeq.formats import gguf_recurrent as recurrent
from moeq.formats import gguf_streams as streams
from moeq.formats import gguf_windows as windowed
from moeq.formats.gguf_family import ALL_SPARSE, NO_BIAS, SILU, Family, Fixed
from moeq.formats.gguf_pieces import (
    Pieces,
    expert_biases,
    halves,
    latent_parts,
    made,
    renamed,
    turned_keys,
    turned_queries,
    vector,
)


def grouped_heads(config: Any) -> str | None:
    """Why llama.cpp, whose keys have as many heads as queries, would refuse a model; None where it would not."""
    same = config.num_key_value_heads == config.num_attention_heads
    return None if same else "each head has keys of its own, and here heads share them (num_key_value_heads)"


def _sparse_to_the_end(config: Any) -> str | None:
    last = config.moe_layer_end_index
    return None if last >= config.num_hidden_layers - 1 else f"the last block has experts, and here block {last} is it"


def _two_bases(config: Any) -> str | None:
    bases = {values["rope_theta"] for values in config.rope_parameters.values()}
    return None if len(bases) == 1 else "one rotary base, and here blocks with a window have another (rope_theta)"


def _turned_at_first(config: Any) -> str | None:
    turned = config.prefix_dense_sliding_window_pattern == 1 or "dense" not in config.mlp_layer_types
    return None if turned else "rotary positions in dense blocks (prefix_dense_sliding_window_pattern: 1)"


def _one_full_in(number: int) -> Callable[[Any], str | None]:
    """Attention in windows but for every so-manieth block."""

    def problem(config: Any) -> str | None:
        full = [i % number == number - 1 for i in range(config.num_hidden_layers)]
        kinds = ["full_attention" if each else "sliding_attention" for each in full]
        return None if list(config.layer_types) == kinds else f"windows in all blocks but one in {number} (layer_types)"

    return problem


_NO_WINDOW: Fixed = ("sliding_window", None)
_NEIGHBOURS: Mapping[str, Pieces] = {
    "self_attn.q_proj": turned_queries("attn_q.weight"),
    "self_attn.k_proj": turned_keys("attn_k.weight"),
}
_LATENT: Mapping[str, Pieces] = {"self_attn.kv_b_proj": latent_parts}
_GRANITE: Mapping[str, Pieces] = {
    **_NEIGHBOURS,
    **{f"block_sparse_moe.experts.{kind}_proj": renamed(f"ffn_{kind}_exps.weight") for kind in ("gate", "up", "down")},
    "block_sparse_moe.router.weight": renamed("ffn_gate_inp.weight"),
    "shared_mlp.input_linear": halves("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}
_EXPERTS = keys.experts("num_experts", "moe_intermediate_size")
_LOCAL = keys.experts("num_local_experts", "intermediate_size")

FAMILIES: dict[str, Family] = {
    "mixtral": Family("llama", _LOCAL, (SILU, NO_BIAS, _NO_WINDOW), _NEIGHBOURS),
    "qwen2_moe": Family(
        "qwen2moe", keys.qwen2_moe, (SILU, ("norm_topk_prob", False), _NO_WINDOW, *ALL_SPARSE),
        {"mlp.shared_expert_gate": vector("ffn_gate_inp_shexp.weight")}, own_head=True,
    ),
    "qwen3_moe": Family(
        "qwen3moe", _EXPERTS, (SILU, NO_BIAS, ("norm_topk_prob", True), _NO_WINDOW, *ALL_SPARSE)
    ),
    "olmoe": Family(
        "olmoe", keys.experts("num_experts", "intermediate_size"),
        (SILU, NO_BIAS, ("norm_topk_prob", False), ("clip_qkv", None)), own_head=True, refuses=grouped_heads,
    ),
    "deepseek_v2": Family(
        "deepseek2", keys.deepseek, (SILU, NO_BIAS, ("mlp_bias", False), ("norm_topk_prob", False)), _LATENT,
        refuses=latent.grouped_experts,
    ),
    "deepseek_v3": Family(
        "deepseek2", keys.deepseek_v3, (SILU, NO_BIAS, ("rope_interleave", True)), _LATENT, refuses=latent.unranked,
    ),
    "glm4_moe_lite": Family(
        "deepseek2", keys.deepseek_v3, (SILU, NO_BIAS, ("rope_interleave", True)), _LATENT, refuses=latent.unranked,
    ),
    "mistral4": Family(
        "mistral4", keys.mistral4, (SILU, NO_BIAS, ("rope_interleave", True)), _LATENT, refuses=latent.mistral4,
    ),
    "granitemoe": Family("granitemoe", keys.granite, (SILU, NO_BIAS), _GRANITE),
    "granitemoeshared": Family("granitemoe", keys.granite, (SILU, NO_BIAS), _GRANITE),
    "gpt_oss": Family(
        "gpt-oss", windowed.gpt_oss, (SILU, ("attention_bias", True), ("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
        {
            "mlp.experts.gate_up_proj_bias": expert_biases,
            "mlp.experts.down_proj_bias": renamed("ffn_down_exps.bias"),
            "self_attn.sinks": renamed("attn_sinks.weight"),
        },
        refuses=_one_full_in(2),
    ),
    "glm4_moe": Family("glm4moe", keys.sigmoid_routing, (SILU,)),
    "solar_open": Family("glm4moe", keys.sigmoid_routing, (SILU, NO_BIAS)),
    "dots1": Family("dots1", keys.sigmoid_routing, (SILU, NO_BIAS), refuses=grouped_heads),
    "ernie4_5_moe": Family(
        "ernie4_5-moe", keys.ernie, (SILU, ("use_bias", False), ("moe_layer_interval", 1)),
        {"mlp.gate.moe_statics.e_score_correction_bias": vector("exp_probs_b.bias")}, refuses=_sparse_to_the_end,
    ),
    "hunyuan_v1_moe": Family("hunyuan-moe", keys.hunyuan, (SILU, NO_BIAS)),
    "minimax_m2": Family("minimax-m2", keys.minimax_m2, (SILU,)),
    "lfm2_moe": Family(
        "lfm2moe", keys.lfm2,
        (("conv_bias", False), ("norm_topk_prob", True), ("routed_scaling_factor", 1.0), ("use_expert_bias", True),
         ("tie_word_embeddings", True)),
        {
            "conv.conv.weight": made("shortconv.conv.weight", lambda weight: weight.squeeze(1)),
            "feed_forward.expert_bias": renamed("exp_probs_b.bias"),
        },
    ),
    "afmoe": Family(
        "afmoe", windowed.afmoe, (SILU, NO_BIAS, ("mup_enabled", True)),
        {"mlp.expert_bias": renamed("exp_probs_b.bias")}, refuses=_one_full_in(4),
    ),
    "exaone_moe": Family("exaone-moe", windowed.exaone, (SILU, NO_BIAS)),
    "qwen3_next": Family(
        "qwen3next", recurrent.qwen3_next, (SILU, NO_BIAS, ("norm_topk_prob", True), *ALL_SPARSE),
        recurrent.QWEN3_NEXT, refuses=recurrent.one_full_in_some,
    ),
    "qwen3_5_moe_text": Family(
        "qwen35moe", recurrent.qwen3_5, (SILU, NO_BIAS), recurrent.QWEN3_5, refuses=recurrent.one_full_in_some
    ),
    "jamba": Family("jamba", mamba.jamba, (SILU, ("mamba_proj_bias", False)), mamba.JAMBA),
    "granitemoehybrid": Family(
        "granitehybrid", lambda config: keys.granite(config) | mamba.granite_hybrid(config),
        (SILU, NO_BIAS, ("mamba_proj_bias", False)), {**_GRANITE, **mamba.MAMBA_2},
    ),
    "hy_v3": Family(
        "hy_v3", keys.hy_v3, (SILU, NO_BIAS, ("mlp_bias", False)),
        {"mlp.e_score_correction_bias": renamed("exp_probs_b")}, names="dots1",
    ),
    "mellum": Family(
        "mellum", windowed.mellum, (SILU, NO_BIAS, ("norm_topk_prob", True)), own_head=True, refuses=_two_bases,
        names="qwen3moe",
    ),
    "mimo_v2_flash": Family(
        "mimo2", windowed.mimo, (SILU, NO_BIAS, ("norm_topk_prob", True), ("routed_scaling_factor", 1.0)),
        {"self_attn.sinks": renamed("attn_sinks.weight")}, own_head=True,
    ),
    "cohere2_moe": Family(
        "cohere2moe", windowed.cohere2, (SILU, NO_BIAS, ("shared_expert_combination_strategy", "average")),
        refuses=_turned_at_first, names="dots1",
    ),
    "kimi_linear": Family(
        "kimi-linear", recurrent.kimi,
        (SILU, NO_BIAS, ("q_lora_rank", None), ("moe_renormalize", True), ("num_expert_group", 1)), recurrent.KIMI,
        own_head=True,
    ),
    "gemma4_text": Family(
        "gemma4", gemma.gemma4,
        (("hidden_activation", "gelu_pytorch_tanh"), NO_BIAS, ("num_kv_shared_layers", 0)), gemma.GEMMA4,
        refuses=gemma.problem,
    ),
    "laguna": Family(
        "laguna", windowed.laguna,
        (SILU, NO_BIAS, ("moe_router_logit_softcapping", 0.0), ("moe_apply_router_weight_on_input", False)),
        {"self_attn.g_proj": renamed("attn_gate.weight")}, names="dots1",
        refuses=windowed.first_full_of_four,
    ),
    "granitemoe_swa": Family(
        "granite_swa", windowed.granite_swa, (SILU, NO_BIAS, ("shared_intermediate_size", 0)),
        {**_GRANITE, "self_attn.sinks": renamed("attn_sinks.weight")}, names="granitemoe",
        refuses=windowed.two_positions,
    ),
    "deepseek_v32": Family(
        "deepseek32", keys.indexed, (SILU, NO_BIAS, ("rope_interleave", True)), _LATENT, names="glm-dsa",
        refuses=latent.indexed,
    ),
    "glm_moe_dsa": Family(
        "glm-dsa", keys.indexed, (SILU, NO_BIAS, ("rope_interleave", True)), _LATENT, refuses=latent.glm_dsa,
    ),
    "qwen4_exp_text": Family(
        "qwen4exp", qwen4.qwen4_exp, (SILU, NO_BIAS, ("norm_topk_prob", True), ("output_gate_type", "sigmoid")),
        qwen4.QWEN4_EXP, names="qwen35moe", numbers=qwen4.HASHES, refuses=qwen4.problem,
    ),
    "deepseek_v4": Family(
        "deepseek4", streams.deepseek_v4,
        (SILU, ("mlp_bias", False), ("scoring_func", "sqrtsoftplus"), ("hc_mult", 4)), streams.DEEPSEEK_V4,
        own_head=True, names="deepseek2", refuses=streams.deepseek_v4_problem,
    ),
    "hy_v4": Family(
        "hy_v4", streams.hy_v4, (SILU, NO_BIAS), streams.HY_V4, own_head=True, names="glm-dsa",
        refuses=streams.hy_v4_problem,
    ),
    "nemotron_h": Family(
        "nemotron_h_moe", mamba.nemotron, (("mlp_hidden_act", "relu2"), NO_BIAS, ("mlp_bias", False)),
        mamba.NEMOTRON,
    ),
    "minimax": Family(
        "minimax-01", lightning.minimax,
        (SILU, _NO_WINDOW, ("full_attn_beta_factor", 1), ("linear_attn_beta_factor", 1), ("mlp_beta_factor", 1)),
        lightning.MINIMAX, names="minimax-m2", refuses=lightning.problem,
    ),
    "bailing_hybrid": Family(
        "bailingmoe3", bailing.bailing, (SILU, NO_BIAS, ("kda_safe_gate", True), ("rms_norm_eps", 1e-6)),
        bailing.BAILING, names="kimi-linear", refuses=bailing.problem,
    ),
    "dots3_note_text": Family(
        "dots3note", dots3.dots3, (SILU, NO_BIAS), dots3.DOTS3, names="glm-dsa", refuses=dots3.problem,
    ),
}  # fmt: skip
