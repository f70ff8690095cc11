"""Ling 3.0 (Bailing hybrid) as llama.cpp reads it: the delta rule with a bounded decay, and gated latent attention."""

from collections.abc import Mapping, Sequence
from typing import Any

from moeq.formats.gguf_mamba import column
from moeq.formats.gguf_metadata import SIGMOID, dense_later, groups
from moeq.formats.gguf_pieces import Piece, Pieces, latent_parts, made, renamed
from moeq.formats.gguf_recurrent import both_kinds, delta_and_latent, projections
from moeq.formats.gguf_rope import Metadata, rope


def _gate(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Of each head in attention, of each channel in the delta rule."""
    return [Piece("attn_gate.weight" if shape[0] == config.num_attention_heads else "ssm_g_a.weight")]


BAILING: Mapping[str, Pieces] = {
    "self_attn.kv_b_proj": latent_parts,
    "self_attn.g_proj": _gate,
    "self_attn.conv1d.weight": projections,
    "self_attn.forget_gate.f_proj": renamed("ssm_f_a.weight"),
    "self_attn.forget_gate.dt_bias": renamed("ssm_dt.bias"),
    "self_attn.forget_gate.A_log": made("ssm_a", lambda a_log: column(a_log.exp())),
}


def bailing(config: Any) -> Metadata:
    """Ling 3.0."""
    return (
        rope(config, config.qk_rope_head_dim)
        | groups(config)
        | {
            **delta_and_latent(config),
            "kda.safe_gate": True,
            "kda.gate_lower_bound": float(config.kda_lower_bound),
            "expert_count": config.num_local_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_shared_feed_forward_length": config.n_shared_experts * config.moe_intermediate_size,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_gating_func": SIGMOID,
        }
    )


def problem(config: Any) -> str | None:
    """What llama.cpp computes otherwise; None where it is nothing."""
    return both_kinds(config) or dense_later(config)
