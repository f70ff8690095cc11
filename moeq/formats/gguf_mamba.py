"""Blocks of Mamba and Mamba 2, beside which attention has no positions or has them, as llama.cpp reads them.

Convolutions lose their middle dimension, decay rates are stored as ``-exp(A_log)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moeq.formats.gguf_metadata import SIGMOID, groups
from moeq.formats.gguf_pieces import Piece, Pieces, made, renamed
from moeq.formats.gguf_rope import Metadata


def decay(a_log: Tensor) -> Tensor:
    """Decay rates."""
    return -a_log.exp()


def channels(conv: Tensor) -> Tensor:
    """A convolution of channels, [C, 1, K], as [C, K]."""
    return conv.squeeze(1)


def column(values: Tensor) -> Tensor:
    """A vector as a matrix of one column."""
    return values.unsqueeze(1)


def norm_of_groups(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Mamba 2's norm, each group apart."""
    count = config.mamba_n_groups if hasattr(config, "mamba_n_groups") else config.n_groups
    return [Piece("ssm_norm.weight", values=lambda weight: weight.float().view(count, shape[0] // count))]


JAMBA: Mapping[str, Pieces] = {
    "mamba.conv1d.weight": made("ssm_conv1d.weight", channels),
    "mamba.A_log": made("ssm_a", decay),
}
MAMBA_2: Mapping[str, Pieces] = {
    "mamba.conv1d.weight": made("ssm_conv1d.weight", channels),
    "mamba.A_log": made("ssm_a", lambda a_log: column(decay(a_log))),
    "mamba.D": made("ssm_d", column),
    "mamba.dt_bias": renamed("ssm_dt.bias"),
    "mamba.norm.weight": norm_of_groups,
}
NEMOTRON: Mapping[str, Pieces] = {
    "norm.weight": renamed("attn_norm.weight"),
    "mixer.in_proj": renamed("ssm_in.weight"),
    "mixer.out_proj": renamed("ssm_out.weight"),
    "mixer.A_log": made("ssm_a", lambda a_log: column(decay(a_log))),
    "mixer.D": made("ssm_d", column),
    "mixer.dt_bias": renamed("ssm_dt.bias"),
    "mixer.conv1d.weight": made("ssm_conv1d.weight", channels),
    "mixer.conv1d.bias": renamed("ssm_conv1d.bias"),
    "mixer.norm.weight": norm_of_groups,
    "mixer.q_proj": renamed("attn_q.weight"),
    "mixer.k_proj": renamed("attn_k.weight"),
    "mixer.v_proj": renamed("attn_v.weight"),
    "mixer.o_proj": renamed("attn_output.weight"),
    "mixer.gate.weight": renamed("ffn_gate_inp.weight"),
    "mixer.gate.e_score_correction_bias": renamed("exp_probs_b.bias"),
    "mixer.experts.up_proj": renamed("ffn_up_exps.weight"),
    "mixer.experts.down_proj": renamed("ffn_down_exps.weight"),
    "mixer.shared_experts.up_proj": renamed("ffn_up_shexp.weight"),
    "mixer.shared_experts.down_proj": renamed("ffn_down_shexp.weight"),
    "mixer.fc1_latent_proj": renamed("ffn_latent_down.weight"),
    "mixer.fc2_latent_proj": renamed("ffn_latent_up.weight"),
}


def _heads_of_attention(config: Any, kinds: Sequence[str]) -> Metadata:
    """No heads where a block has no attention."""
    full = ("attention", "full_attention")
    return {"attention.head_count_kv": [config.num_key_value_heads if kind in full else 0 for kind in kinds]}


def jamba(config: Any) -> Metadata:
    """Jamba: Mamba, and attention without positions."""
    period, offset = config.attn_layer_period, config.attn_layer_offset
    kinds = ["attention" if i % period == offset else "mamba" for i in range(config.num_hidden_layers)]
    return _heads_of_attention(config, kinds) | {
        "expert_count": config.num_experts,
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": config.mamba_dt_rank,
    }


def granite_hybrid(config: Any) -> Metadata:
    """What Granite 4 has beyond Granite: Mamba 2, and attention with or without positions."""
    return _heads_of_attention(config, config.layer_types) | {
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.inner_size": config.mamba_expand * config.hidden_size,
        "ssm.time_step_rank": config.mamba_n_heads,
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
    }


def nemotron(config: Any) -> Metadata:
    """Nemotron-H: each block is Mamba 2, attention without positions, or experts, these in a smaller space or not."""
    kinds = list(config.layers_block_type)
    width = config.moe_intermediate_size
    latent = {} if config.moe_latent_size is None else {"moe_latent_size": config.moe_latent_size}
    return (
        _heads_of_attention(config, kinds)
        | groups(config)
        | latent
        | {
            "block_count": len(kinds),
            "feed_forward_length": [width if kind == "moe" else 0 for kind in kinds],
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
            "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
            "rope.dimension_count": config.head_dim,
            "rope.scaling.finetuned": False,
            "ssm.conv_kernel": config.conv_kernel,
            "ssm.state_size": config.ssm_state_size,
            "ssm.group_count": config.n_groups,
            "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
            "ssm.time_step_rank": config.mamba_num_heads,
            "expert_count": config.n_routed_experts,
            "expert_feed_forward_length": width,
            "expert_shared_count": config.n_shared_experts,
            "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_gating_func": SIGMOID,
        }
    )
