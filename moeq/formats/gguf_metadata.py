"""Keys of a GGUF file that describe the model, in the words that llama.cpp reads, from a configuration."""

from collections.abc import Callable
from typing import Any

from moeq.formats.gguf_rope import Metadata, head_dim, latent_rope, rope

# What a family says beyond ``common``: keys below the architecture's name.
Describe = Callable[[Any], Metadata]

# llama.cpp's numbers of the function of a router's scores.
SOFTMAX, SIGMOID = 1, 2


def common(config: Any) -> Metadata:
    """Keys that every architecture reads; None stands for none.

    Args:
        config: Of transformers.
    """
    block = config.per_layer_config[0]  # a family whose heads differ between blocks says so itself
    head = head_dim(block)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": block.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": None if (epsilon := _epsilon(config)) is None else float(epsilon),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }


def _epsilon(config: Any) -> float | None:
    """Of its norms; None where they are none of the mean square, or have another name."""
    return getattr(config, "rms_norm_eps", getattr(config, "norm_eps", None))


def experts(count: str, width: str) -> Describe:
    """Routed experts, by what a configuration calls their number and their width, and a rotary embedding of heads."""
    return lambda config: {
        **rope(config, head_dim(config)),
        "expert_count": getattr(config, count),
        "expert_feed_forward_length": getattr(config, width),
    }


def qwen2_moe(config: Any) -> Metadata:
    """Qwen2-MoE."""
    return experts("num_experts", "moe_intermediate_size")(config) | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size
    }


def deepseek(config: Any) -> Metadata:
    """DeepSeek-V2: latent attention, as one group of keys and values as wide as what they are made of."""
    return latent_rope(config, config.qk_rope_head_dim) | latent(config)


def latent(config: Any) -> Metadata:
    """Sizes of latent attention, and experts beside it."""
    turned = config.qk_rope_head_dim
    rank = {} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank}
    return {
        **rank,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + turned,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + turned,
        "attention.value_length_mla": config.v_head_dim,
        **_deepseek_experts(config),
    }


def _deepseek_experts(config: Any) -> Metadata:
    """Routed and shared experts by the names of DeepSeek's configurations."""
    return {
        "leading_dense_block_count": num_dense(config),
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(getattr(config, "norm_topk_prob", False)),
    }


def deepseek_v3(config: Any) -> Metadata:
    """DeepSeek-V3: scores are sigmoids, and experts are chosen from the best groups."""
    return deepseek(config) | {"expert_gating_func": SIGMOID} | groups(config)


def mistral4(config: Any) -> Metadata:
    """Mistral 4: DeepSeek's attention, queries that grow with their position, and softmax over groups of experts."""
    rope = config.rope_parameters
    return (
        deepseek(config)
        | groups(config)
        | {
            "expert_gating_func": SOFTMAX,
            "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
            "attention.temperature_length": int(rope["original_max_position_embeddings"]),
        }
    )


def deepseek_ocr(config: Any) -> Metadata:
    """DeepSeek-OCR 2 and Unlimited-OCR: DeepSeek's experts beside ordinary attention."""
    return {**rope(config, head_dim(config)), **_deepseek_experts(config), "expert_gating_func": SOFTMAX}


def indexed(config: Any) -> Metadata:
    """DeepSeek-V3.2 and GLM-5: the same, with indexers that choose which tokens are looked at, for later blocks too."""
    return deepseek_v3(config) | indexer(config)


def indexer(config: Any) -> Metadata:
    """Indexers of latent attention."""
    kinds = getattr(config, "indexer_types", None)
    return {
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        **({} if kinds is None else {"attention.indexer.types": [int(kind == "full") for kind in kinds]}),
    }


def groups(config: Any) -> Metadata:
    """Groups that experts are chosen from."""
    if not config.n_group or config.n_group == 1:
        return {}
    return {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}


def hy_v3(config: Any) -> Metadata:
    """Hunyuan 3: scores that are sigmoids with a correction."""
    return experts("num_experts", "moe_intermediate_size")(config) | {
        "leading_dense_block_count": num_dense(config),
        "expert_shared_count": config.num_shared_experts,
        "expert_shared_feed_forward_length": config.num_shared_experts * config.moe_intermediate_size,
        "expert_weights_scale": float(config.router_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }


def sigmoid_routing(config: Any) -> Metadata:
    """Scores that are sigmoids with a correction, in groups, beside shared experts: DeepSeek-V3's routing."""
    return groups(config) | {
        **rope(config, head_dim(config)),
        **_deepseek_experts(config),
        "expert_gating_func": SIGMOID,
    }


def granite(config: Any) -> Metadata:
    """Granite: factors at the embedding, the residual stream, attention and the head."""
    shared = getattr(config, "shared_intermediate_size", 0)
    return experts("num_local_experts", "intermediate_size")(config) | {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "logit_scale": float(config.logits_scaling),
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
    }


def minimax_m2(config: Any) -> Metadata:
    """MiniMax-M2: scores that are sigmoids with a correction."""
    return experts("num_local_experts", "intermediate_size")(config) | {"expert_gating_func": SIGMOID}


def ernie(config: Any) -> Metadata:
    """Ernie 4.5."""
    shared = config.moe_num_shared_experts * config.moe_intermediate_size
    return experts("moe_num_experts", "moe_intermediate_size")(config) | {
        "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "expert_used_count": config.moe_k,
        "expert_shared_count": config.moe_num_shared_experts,
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
    }


def hunyuan(config: Any) -> Metadata:
    """Hunyuan: its rotary base may be stretched by ``alpha``."""
    values, head = dict(config.rope_parameters), head_dim(config)
    keys: Metadata = {
        "expert_count": config.num_experts,
        "expert_used_count": config.moe_topk,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.intermediate_size,
    }
    if values.get("rope_type") != "dynamic" or not values.get("alpha"):
        return rope(config, head) | keys
    base = values["rope_theta"] * values["alpha"] ** (head / (head - 2))
    return keys | {"rope.dimension_count": head, "rope.freq_base": float(base)}


def lfm2(config: Any) -> Metadata:
    """LFM2: blocks with a short convolution have no heads."""
    kinds = config.layer_types
    return experts("num_experts", "moe_intermediate_size")(config) | {
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        "shortconv.l_cache": config.conv_L_cache,
        "leading_dense_block_count": config.num_dense_layers,
        "expert_gating_func": SIGMOID,
    }


def num_dense(config: Any) -> int:
    """How many blocks at the beginning have no experts."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return int(next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds)))
    return int(getattr(config, "first_k_dense_replace", 0))


def dense_later(config: Any) -> str | None:
    """Why blocks without experts are elsewhere than at the beginning; None where they are not."""
    later = "dense" in list(config.mlp_layer_types)[num_dense(config) :]
    return "blocks without experts at the beginning alone (mlp_layer_types)" if later else None
