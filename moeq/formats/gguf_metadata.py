"""Keys of a GGUF file that describe the model, in the words that llama.cpp reads, from a configuration."""

import math
from collections.abc import Callable
from typing import Any

Metadata = dict[str, Any]
# What a family says beyond ``common``: keys below the architecture's name.
Describe = Callable[[Any], Metadata]

SIGMOID = 2  # llama.cpp's number of the function of a router's scores; softmax is its default


def common(config: Any) -> Metadata:
    """Keys that every architecture reads.

    Args:
        config: Of transformers.
    """
    head = head_dim(config)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(first(config, "rms_norm_eps", "norm_eps")),
        "expert_used_count": config.num_experts_per_tok,
    }


def first(config: Any, *names: str) -> Any:
    """The first of some options that a configuration has."""
    return next(getattr(config, name) for name in names if hasattr(config, name))


def head_dim(config: Any) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(config: Any, head: int) -> Metadata:
    """Rotary embedding of heads of a size; raises ValueError for a kind of scaling that is not written."""
    values = dict(config.rope_parameters or {})
    kind = values.get("rope_type", "default")
    turned = int(head * values.get("partial_rotary_factor", 1.0))
    keys: Metadata = {"rope.dimension_count": turned, "rope.freq_base": float(values["rope_theta"])}
    if kind == "default":
        return keys
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(values["factor"])}
    if kind == "yarn":
        _check_magnitude(values)
        return keys | _yarn(config, values)
    raise ValueError(f"rotary scaling of kind {kind} is not written; default, linear and yarn are")


def _yarn(config: Any, values: dict[str, Any]) -> Metadata:
    if not values.get("truncate", True):
        raise ValueError("llama.cpp rounds the range of yarn to whole dimensions, and the model does not (truncate)")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(values["factor"]),
        "rope.scaling.original_context_length": int(
            values.get("original_max_position_embeddings") or config.max_position_embeddings
        ),
        "rope.scaling.yarn_beta_fast": float(values.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(values.get("beta_slow") or 1.0),
    }


def _check_magnitude(values: dict[str, Any]) -> None:
    """llama.cpp multiplies by 0.1 log(factor) + 1, whatever a model says."""
    own = 0.1 * math.log(values["factor"]) + 1.0
    given = values.get("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        raise ValueError("llama.cpp computes the magnitude of yarn without mscale and mscale_all_dim")
    if given is not None and not math.isclose(given, own, rel_tol=1e-6):
        raise ValueError(f"llama.cpp computes yarn with attention_factor: {own:.6g}, and this model has {given:.6g}")


def _latent_rope(config: Any, head: int) -> Metadata:
    """Rotary embedding of DeepSeek, whose yarn scales the scores of attention by ``mscale_all_dim``."""
    values = dict(config.rope_parameters or {})
    if values.get("rope_type", "default") != "yarn":
        return rope(config, head)
    scale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if not all_dim or scale != all_dim or values.get("attention_factor") is not None:
        raise ValueError("llama.cpp computes yarn with mscale equal to mscale_all_dim, and this model differs")
    keys: Metadata = {"rope.dimension_count": head, "rope.freq_base": float(values["rope_theta"])}
    return keys | _yarn(config, values) | {"rope.scaling.yarn_log_multiplier": 0.1 * float(all_dim)}


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
    turned = config.qk_rope_head_dim
    rank = {} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank}
    return {
        **_latent_rope(config, turned),
        **rank,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + turned,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + turned,
        "attention.value_length_mla": config.v_head_dim,
        "leading_dense_block_count": num_dense(config),
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def deepseek_v3(config: Any) -> Metadata:
    """DeepSeek-V3: scores are sigmoids, and experts are chosen from the best groups."""
    return deepseek(config) | {"expert_gating_func": SIGMOID} | groups(config)


def groups(config: Any) -> Metadata:
    """Groups that experts are chosen from."""
    if not config.n_group or config.n_group == 1:
        return {}
    return {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}


def sigmoid_routing(config: Any) -> Metadata:
    """Scores that are sigmoids with a correction, in groups, beside shared experts: DeepSeek-V3's routing."""
    return groups(config) | {
        **rope(config, head_dim(config)),
        "leading_dense_block_count": num_dense(config),
        "expert_count": config.n_routed_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
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


def gpt_oss(config: Any) -> Metadata:
    """gpt-oss: a window in every other block."""
    window = {"attention.sliding_window": config.sliding_window}
    return experts("num_local_experts", "intermediate_size")(config) | window


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


def afmoe(config: Any) -> Metadata:
    """AFMoE (Trinity): windows, and scores that are sigmoids with a correction."""
    return experts("num_experts", "moe_intermediate_size")(config) | {
        "attention.sliding_window": config.sliding_window,
        "leading_dense_block_count": config.num_dense_layers,
        "expert_shared_count": config.num_shared_experts,
        "expert_weights_scale": float(config.route_scale),
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }


def exaone(config: Any) -> Metadata:
    """EXAONE MoE: windows, rotary positions in these alone."""
    return (
        experts("num_experts", "moe_intermediate_size")(config)
        | groups(config)
        | {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
            "leading_dense_block_count": num_dense(config),
            "expert_shared_count": config.num_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_gating_func": SIGMOID,
        }
    )


def num_dense(config: Any) -> int:
    """How many blocks at the beginning have no experts."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return int(next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds)))
    return int(getattr(config, "first_k_dense_replace", 0))
