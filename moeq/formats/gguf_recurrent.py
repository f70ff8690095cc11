"""Blocks with the gated delta rule in place of attention, as llama.cpp reads them: Qwen3-Next, Qwen3.5, Kimi Linear.

Heads of values stand in transformers beside the head of keys that they share; of Qwen3.5, llama.cpp has the first of
each, then the second.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeq.formats.gguf_mamba import channels, column, decay
from moeq.formats.gguf_metadata import SIGMOID, num_dense, qwen2_moe
from moeq.formats.gguf_pieces import Piece, Pieces, latent_parts, made, renamed, vector
from moeq.formats.gguf_rope import Metadata, sections_in_turn


def plus_one(weight: Tensor) -> Tensor:
    """A norm that multiplies by 1 + weight."""
    return weight + 1.0


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
    """Qwen3.5: the same with rotary positions in three sections."""
    keys = qwen3_next(config)
    return keys | sections_in_turn(keys)


def one_full_in_some(config: Any) -> str | None:
    """Why the kinds of blocks are none that the interval says; None where they are."""
    kinds = list(config.layer_types)
    number = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    full = [i % number == number - 1 for i in range(len(kinds))]
    same = kinds == ["full_attention" if each else "linear_attention" for each in full]
    return None if same and any(full) else "full attention in every so-manieth block (layer_types)"


def both_kinds(config: Any) -> str | None:
    """Why llama.cpp would end at a model that lacks a kind of blocks; None where it has both."""
    both = {"linear_attention", "full_attention"} <= set(config.layer_types)
    return None if both else "full attention in some blocks and linear attention in others (layer_types)"


def projections(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Kimi Linear and Ling 3.0: a convolution of queries, keys and values together."""
    width = shape[0] // 3

    def part(index: int) -> Callable[[Tensor], Tensor]:
        rows = slice(index * width, (index + 1) * width)
        return lambda conv: channels(conv.float())[rows].view(1, width, 1, -1)

    return [Piece(f"ssm_conv1d_{name}.weight", values=part(index)) for index, name in enumerate("qkv")]


KIMI: Mapping[str, Pieces] = {
    "self_attn.kv_b_proj": latent_parts,
    "self_attn.conv1d.weight": projections,
    "self_attn.forget_gate.f_a_proj": renamed("ssm_f_a.weight"),
    "self_attn.forget_gate.f_b_proj": renamed("ssm_f_b.weight"),
    "self_attn.forget_gate.dt_bias": renamed("ssm_dt.bias"),
    "self_attn.forget_gate.A_log": made("ssm_a", lambda a_log: column(decay(a_log.flatten()))),
}


def delta_and_latent(config: Any) -> Metadata:
    """Kimi Linear and Ling 3.0: the delta rule in some blocks, latent attention in others, dense blocks first."""
    turned = config.qk_rope_head_dim  # whatever partial_rotary_factor says, which is of other heads
    return {
        "attention.head_count_kv": [1 if kind == "full_attention" else 0 for kind in config.layer_types],
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + turned,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + turned,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": turned,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "kda.head_dim": config.linear_head_dim,
        "leading_dense_block_count": num_dense(config),
    }


def kimi(config: Any) -> Metadata:
    """Kimi Linear: the delta rule with a decay per channel, and latent attention without positions."""
    return {
        **delta_and_latent(config),
        "expert_count": config.num_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.num_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": SIGMOID,
    }
