"""Blocks with a recurrent state in place of attention, as llama.cpp reads them: Mamba, Mamba 2, gated delta rule.

Convolutions lose their middle dimension, decay rates are stored as ``-exp(A_log)``.  Heads of values of the gated delta
rule stand in transformers beside the head of keys that they share; llama.cpp has the first of each, then the second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeq.formats.gguf_metadata import Metadata, qwen2_moe
from moeq.formats.gguf_pieces import Piece, Pieces, made, renamed, vector


def decay(a_log: Tensor) -> Tensor:
    """Decay rates."""
    return -a_log.exp()


def channels(conv: Tensor) -> Tensor:
    """A convolution of channels, [C, 1, K], as [C, K]."""
    return conv.squeeze(1)


def plus_one(weight: Tensor) -> Tensor:
    """A norm that multiplies by 1 + weight."""
    return weight + 1.0


def column(values: Tensor) -> Tensor:
    """A vector as a matrix of one column."""
    return values.unsqueeze(1)


def norm_of_groups(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Mamba 2's norm, each group apart."""
    groups = config.mamba_n_groups
    return [Piece("ssm_norm.weight", values=lambda weight: weight.float().view(groups, shape[0] // groups))]


def grouped_projection(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Qwen3-Next: queries, keys, values and gates of one head of keys after another."""
    keys, width = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    rows = torch.arange(shape[0]).view(keys, 2 * width + 2 * values)
    query, key, value, gate = rows.split([width, width, values, values], 1)
    mixed = torch.cat([query.flatten(), key.flatten(), value.flatten()])
    return [Piece("attn_qkv.weight", mixed), Piece("attn_gate.weight", gate.flatten())]


def value_order(config: Any, width: int) -> Tensor:
    """Indices of what heads of values have, ``width`` each, in llama.cpp's order."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return torch.arange(values * width).view(keys, values // keys, width).transpose(0, 1).flatten()


def mixed_order(config: Any) -> Tensor:
    """The same of queries, keys and values together, of which only values have another order."""
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([torch.arange(before), before + value_order(config, config.linear_value_head_dim)])


def _mixed(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    return [Piece("attn_qkv.weight", mixed_order(config))]


def _mixed_channels(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    order = mixed_order(config)
    return [Piece("ssm_conv1d.weight", values=lambda conv: channels(conv.float())[order])]


def _out(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    return [Piece("ssm_out.weight", columns=value_order(config, config.linear_value_head_dim))]


def _of_values(name: str) -> Pieces:
    """Rows of heads of values, all that each has."""
    return lambda config, shape: [Piece(name, value_order(config, shape[0] // config.linear_num_value_heads))]


def _decay_of_values(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    order = value_order(config, 1)
    return [Piece("ssm_a", values=lambda a_log: decay(a_log.float())[order])]


_NORMS: Mapping[str, Pieces] = {
    "model.norm.weight": made("output_norm.weight", plus_one),
    "input_layernorm.weight": made("attn_norm.weight", plus_one),
    "post_attention_layernorm.weight": made("post_attention_norm.weight", plus_one),
    "self_attn.q_norm.weight": made("attn_q_norm.weight", plus_one),
    "self_attn.k_norm.weight": made("attn_k_norm.weight", plus_one),
    "mlp.shared_expert_gate": vector("ffn_gate_inp_shexp.weight"),
}
QWEN3_NEXT: Mapping[str, Pieces] = {
    **_NORMS,
    "linear_attn.in_proj_qkvz": grouped_projection,
    "linear_attn.dt_bias": renamed("ssm_dt.bias"),
    "linear_attn.A_log": made("ssm_a", decay),
    "linear_attn.conv1d.weight": made("ssm_conv1d.weight", channels),
}
QWEN3_5: Mapping[str, Pieces] = {
    **_NORMS,
    "linear_attn.in_proj_qkv": _mixed,
    "linear_attn.in_proj_z": _of_values("attn_gate.weight"),
    "linear_attn.in_proj_b": _of_values("ssm_beta.weight"),
    "linear_attn.in_proj_a": _of_values("ssm_alpha.weight"),
    "linear_attn.out_proj": _out,
    "linear_attn.dt_bias": _of_values("ssm_dt.bias"),
    "linear_attn.A_log": _decay_of_values,
    "linear_attn.conv1d.weight": _mixed_channels,
}
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


def qwen3_next(config: Any) -> Metadata:
    """Qwen3-Next: full attention in every so-manieth block, the gated delta rule in the others."""
    return qwen2_moe(config) | {
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def qwen3_5(config: Any) -> Metadata:
    """Qwen3.5: the same with rotary positions in three sections, which are equal for texts: each third dimension."""
    keys = qwen3_next(config)
    half = keys["rope.dimension_count"] // 2
    return keys | {"rope.dimension_sections": [(half + 2) // 3, (half + 1) // 3, half // 3, 0]}


def one_full_in_some(config: Any) -> str | None:
    """Why the kinds of blocks are none that the interval says; None where they are."""
    kinds = list(config.layer_types)
    number = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    full = [i % number == number - 1 for i in range(len(kinds))]
    same = kinds == ["full_attention" if each else "linear_attention" for each in full]
    return None if same and any(full) else "full attention in every so-manieth block (layer_types)"


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
