"""Keys of families whose blocks look at a window, some or all of them."""

from types import SimpleNamespace
from typing import Any

from moeq.formats.gguf_metadata import SIGMOID, SOFTMAX, experts, granite, groups, num_dense
from moeq.formats.gguf_rope import Metadata, head_dim, rope, rope_of_kinds


def windows(config: Any) -> Metadata:
    """Which blocks have a window, and its width; nothing where none has."""
    if "sliding_attention" not in config.layer_types:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def gpt_oss(config: Any) -> Metadata:
    """gpt-oss: a window in every other block."""
    window = {"attention.sliding_window": config.sliding_window}
    return experts("num_local_experts", "intermediate_size")(config) | window


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


def mellum(config: Any) -> Metadata:
    """Mellum: windows with a rotary base of their own."""
    return (
        windows(config)
        | rope_of_kinds(config, head_dim(config))
        | {
            "expert_count": config.num_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    )


def mimo(config: Any) -> Metadata:
    """MiMo-V2: windows with heads and a rotary base of their own."""
    heads = [config.num_key_value_heads * (2 if kind == "sliding_attention" else 1) for kind in config.layer_types]
    return (
        windows(config)
        | rope_of_kinds(config, config.head_dim)
        | groups(config)
        | {
            "attention.head_count_kv": heads,
            "attention.value_length": config.v_head_dim,
            "attention.value_scale": float(config.attention_value_scale),
            "expert_count": config.n_routed_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_gating_func": SIGMOID,
        }
    )


def cohere2(config: Any) -> Metadata:
    """Command A MoE: windows, rotary positions in these alone."""
    return (
        experts("num_experts", "intermediate_size")(config)
        | windows(config)
        | {
            "attention.layer_norm_epsilon": float(config.layer_norm_eps),
            "attention.layer_norm_rms_epsilon": None,  # its norms subtract the mean
            "logit_scale": float(config.logit_scale),
            "feed_forward_length": config.prefix_dense_intermediate_size or config.intermediate_size,
            "leading_dense_block_count": num_dense(config),
            "expert_weights_norm": bool(config.norm_topk_prob) or config.expert_selection_fn == "softmax",
            "expert_gating_func": SIGMOID if config.expert_selection_fn == "sigmoid" else SOFTMAX,
            "expert_shared_count": config.num_shared_experts,
        }
    )


def laguna(config: Any) -> Metadata:
    """Laguna: windows with a rotary embedding of their own, gated attention, scores that are sigmoids."""
    head, full = config.head_dim, config.rope_parameters["full_attention"]
    keys: Metadata = {
        **rope(SimpleNamespace(rope_parameters=full, max_position_embeddings=config.max_position_embeddings), head),
        "attention.head_count": list(config.num_attention_heads_per_layer),
        "leading_dense_block_count": num_dense(config),
        "expert_count": config.num_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "expert_weights_scale": float(config.moe_routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }
    if "sliding_attention" not in config.layer_types:
        return keys
    window = config.rope_parameters["sliding_attention"]
    if window.get("rope_type", "default") != "default":
        raise ValueError("rotary scaling of blocks with a window is not written")
    return keys | {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(window["rope_theta"]),
        "rope.dimension_count_swa": int(head * window.get("partial_rotary_factor", 1.0)),
    }


def granite_swa(config: Any) -> Metadata:
    """Granite with windows, and blocks without positions."""
    turned = [theta != 0 for theta in config.layer_rope_theta]
    return (
        granite(config)
        | {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        }
        | ({} if all(turned) else {"attention.rope_pattern": turned})
    )


def first_full_of_four(config: Any) -> str | None:
    """Why windows are in other blocks than llama.cpp takes for granted of Laguna; None where they are not."""
    windows = [kind == "sliding_attention" for kind in config.layer_types]
    same = not any(windows) or windows == [i % 4 != 0 for i in range(len(windows))]
    return None if same else "windows in all blocks but the first of four, or in none (layer_types)"


def two_positions(config: Any) -> str | None:
    """Why blocks have other rotary bases than that of all or none; None where they have not."""
    bases = {base for base in config.layer_rope_theta if base}
    return None if bases <= {config.rope_parameters["rope_theta"]} else "one rotary base (layer_rope_theta)"
