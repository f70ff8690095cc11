"""Blocks that pass on several residual streams, as llama.cpp reads them: DeepSeek-V4 and Hunyuan 4.

What reads and writes the streams (hyper-connections) has the same names in both; DeepSeek-V4 mixes the streams, too.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moeq.formats.gguf_latent import wide_heads
from moeq.formats.gguf_metadata import SIGMOID, dense_later, groups, indexer, latent
from moeq.formats.gguf_pieces import Piece, Pieces, latent_parts, renamed
from moeq.formats.gguf_rope import Metadata, rope, yarn

# llama.cpp's number of the square root of softplus as the function of a router's scores.
SQRT_SOFTPLUS = 4
# How many tokens a compressed key is made of, by kind of block; llama.cpp knows blocks by it.
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

STREAMS: Mapping[str, Pieces] = {
    **{
        f"{part}_hc.{kind}": renamed(f"hc_{part}_{kind}.weight")
        for part in ("attn", "ffn")
        for kind in ("fn", "base", "scale")
    },
    **{f"model.hc_head.hc_{kind}": renamed(f"output_hc_{kind}.weight") for kind in ("fn", "base", "scale")},
    "self_attn.sinks": renamed("attn_sinks.weight"),
}


def _compressor(path: str, name: str) -> dict[str, Pieces]:
    """What makes one key of the keys of several tokens."""
    return {
        f"{path}.kv_proj": renamed(f"{name}_kv.weight"),
        f"{path}.gate_proj": renamed(f"{name}_gate.weight"),
        f"{path}.position_bias": renamed(f"{name}_ape.weight"),
        f"{path}.kv_norm.weight": renamed(f"{name}_norm.weight"),
    }


DEEPSEEK_V4: Mapping[str, Pieces] = {
    **STREAMS,
    "self_attn.q_a_norm.weight": renamed("attn_q_a_norm.weight"),
    "self_attn.kv_proj": renamed("attn_kv.weight"),
    "self_attn.kv_norm.weight": renamed("attn_kv_a_norm.weight"),
    "self_attn.o_a_proj.weight": renamed("attn_output_a.weight"),
    "self_attn.o_b_proj": renamed("attn_output_b.weight"),
    **_compressor("self_attn.compressor", "attn_compressor"),
    **_compressor("self_attn.compressor.indexer", "indexer_compressor"),
    "self_attn.compressor.indexer.q_b_proj": renamed("indexer.attn_q_b.weight"),
    "self_attn.compressor.indexer.scorer.weights_proj": renamed("indexer.proj.weight"),
    "mlp.gate.tid2eid": renamed("ffn_gate_tid2eid.weight"),
}


def deepseek_v4(config: Any) -> Metadata:
    """DeepSeek-V4: one head of keys that are values, too, compressed in some blocks; in some, experts bound to tokens.

    transformers has one shared expert and scores that sum to the scale, whatever the configuration says.
    """
    limits = [float(config.swiglu_limit)] * config.num_hidden_layers
    return {
        **_ropes(config),
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.output_lora_rank": config.o_lora_rank,
        "attention.output_group_count": config.o_groups,
        "attention.sliding_window": config.sliding_window,
        "attention.compress_ratios": [RATIOS[kind] for kind in config.layer_types],
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(config.hc_eps),
        "hash_layer_count": config.mlp_layer_types.count("hash_moe"),
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": 1,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": SQRT_SOFTPLUS,
        "swiglu_clamp_exp": limits,
        "swiglu_clamp_shexp": limits,
    }


def _ropes(config: Any) -> Metadata:
    """Rotary embeddings: blocks with compressed keys have a base of their own, and yarn without a magnitude."""
    main, compress = config.rope_parameters["main"], config.rope_parameters["compress"]
    keys = rope(SimpleNamespace(rope_parameters=main), config.head_dim)
    keys["attention.compress_rope_freq_base"] = float(compress["rope_theta"])
    return keys | (yarn(config, compress) if compress["rope_type"] == "yarn" else {})


def deepseek_v4_problem(config: Any) -> str | None:
    """What llama.cpp computes otherwise of DeepSeek-V4, or ends with; None where there is nothing."""
    main, compress = config.rope_parameters["main"], config.rope_parameters["compress"]
    if wrong := {kind: rate for kind, rate in config.compress_rates.items() if rate != RATIOS[kind]}:
        return f"keys of 4 and 128 tokens (compress_rates), and here some are of {min(wrong.values())} tokens"
    if "compressed_sparse_attention" not in config.layer_types:
        return "an indexer in some block (compressed_sparse_attention of layer_types), without which it ends"
    if "hash_moe" in config.mlp_layer_types[config.mlp_layer_types.count("hash_moe") :]:
        return "experts bound to tokens in the first blocks alone (mlp_layer_types)"
    if main["rope_type"] != "default" or compress["rope_type"] not in ("default", "yarn"):
        return "rotary positions without scaling, or with yarn in blocks with compressed keys (rope_parameters)"
    if main.get("partial_rotary_factor") != compress.get("partial_rotary_factor"):
        return "as many turned dimensions in all blocks (partial_rotary_factor)"
    if compress["rope_type"] == "yarn" and compress.get("attention_factor") != 1.0:
        return f"yarn with attention_factor: 1, and here it is {compress.get('attention_factor')}"
    return wide_heads(config) or _unlimited(config)


def hy_v4(config: Any) -> Metadata:
    """Hunyuan 4: latent attention with gates and an indexer, each stream read and written with weights of its own."""
    return {
        **rope(config, config.qk_rope_head_dim),
        **latent(config),
        **groups(config),
        **indexer(config),
        "expert_gating_func": SIGMOID,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.epsilon": float(config.hc_eps),
        "hyper_connection.magnitude": float(config.hc_magnitude),
        "swiglu_clamp_exp": [float(config.swiglu_limit)] * config.num_hidden_layers,
    }


def hy_v4_problem(config: Any) -> str | None:
    """What llama.cpp computes otherwise of Hunyuan 4; None where there is nothing."""
    if config.rope_parameters.get("mscale_all_dim"):
        return "scores of attention without a magnitude of yarn (mscale_all_dim)"
    return _unlimited(config) or dense_later(config)


def _unlimited(config: Any) -> str | None:
    """Transformers limits by 0, and by less; llama.cpp then does not limit."""
    limit = config.swiglu_limit
    return None if limit > 0 else f"gates limited by more than 0, and here by {limit} (swiglu_limit)"


def _turned_last(name: str, heads: Callable[[Any], int] = lambda config: 1) -> Pieces:
    """Rows of heads whose last ones are turned by halves, for a runtime that turns neighbours."""

    def make(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
        rows = torch.arange(shape[0]).view(heads(config), -1)
        still, turned = rows[:, : -config.qk_rope_head_dim], rows[:, -config.qk_rope_head_dim :]
        neighbours = turned.unflatten(1, (2, -1)).mT.flatten(1)
        return [Piece(name, torch.cat([still, neighbours], 1).flatten())]

    return make


# Norms of the indexer's keys go before these are turned, with their rows.
HY_V4: Mapping[str, Pieces] = {
    **STREAMS,
    "self_attn.q_b_proj": _turned_last("attn_q_b.weight", lambda config: config.num_attention_heads),
    "self_attn.kv_a_proj_with_mqa": _turned_last("attn_kv_a_mqa.weight"),
    "self_attn.kv_b_proj": latent_parts,
    "self_attn.gate_proj": renamed("attn_gate.weight"),
    "self_attn.indexer.wq_b": _turned_last("indexer.attn_q_b.weight", lambda config: config.index_n_heads),
    "self_attn.indexer.wk": _turned_last("indexer.attn_k.weight"),
    "self_attn.indexer.k_norm.weight": _turned_last("indexer.k_norm.weight"),
    "self_attn.indexer.k_norm.bias": _turned_last("indexer.k_norm.bias"),
}
