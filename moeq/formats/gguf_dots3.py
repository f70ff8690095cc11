"""dots3 note as llama.cpp reads it: gated latent attention in blocks of two shapes, with an indexer or a window.

transformers multiplies the normalized parts that queries, keys and values are made of by a root of sizes, which the
norms hold in the file; its indexer turns neighbours, llama.cpp's turns dimensions half of what turns apart.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeq.formats.gguf_latent import wide_heads
from moeq.formats.gguf_metadata import SIGMOID, dense_later, groups, num_dense
from moeq.formats.gguf_pieces import Piece, Pieces, latent_parts, renamed
from moeq.formats.gguf_rope import Metadata

_INDEXED, _WINDOW = "indexed_attention", "sliding_attention"


def _rescaled(name: str) -> Pieces:
    """A norm of a part that a projection of the hidden state to fewer dimensions gives."""

    def make(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
        scale = math.sqrt(config.hidden_size / shape[0])
        return [Piece(name, values=lambda weight: weight.float() * scale)]

    return make


def apart(config: Any, rows: int) -> Tensor:
    """Order of rows of heads of the indexer for a runtime that turns dimensions half of what turns apart."""
    turned, head = config.qk_rope_head_dim, config.index_head_dim
    order = torch.arange(head)
    order[:turned] = order[:turned].view(-1, 2).mT.flatten()
    return (torch.arange(0, rows, head)[:, None] + order).flatten()


def _turned(name: str) -> Pieces:
    return lambda config, shape: [Piece(name, apart(config, shape[0]))]


DOTS3: Mapping[str, Pieces] = {
    "self_attn.kv_b_proj": latent_parts,
    "self_attn.g_proj": renamed("attn_gate.weight"),
    "self_attn.k_rope_only_layernorm.weight": renamed("attn_k_norm.weight"),
    "self_attn.q_a_layernorm.weight": _rescaled("attn_q_a_norm.weight"),
    "self_attn.kv_a_layernorm.weight": _rescaled("attn_kv_a_norm.weight"),
    "self_attn.indexer.wq_b": _turned("indexer.attn_q_b.weight"),
    "self_attn.indexer.wk": _turned("indexer.attn_k.weight"),
    "self_attn.indexer.k_norm.weight": _turned("indexer.k_norm.weight"),
    "self_attn.indexer.k_norm.bias": _turned("indexer.k_norm.bias"),
}


def _shape(config: Any, ending: str = "") -> Metadata:
    """Latent attention of one kind of blocks."""
    turned, rank = config.qk_rope_head_dim, config.kv_lora_rank
    return {
        f"attention.kv_lora_rank{ending}": rank,
        f"attention.key_length{ending}": rank + turned,
        f"attention.value_length{ending}": rank,
        f"attention.key_length_mla{ending}": config.qk_nope_head_dim + turned,
        f"attention.value_length_mla{ending}": config.v_head_dim,
    }


def dots3(config: Any) -> Metadata:
    """dots3 note: heads and shapes of both kinds of blocks, the indexer, and scores that are sigmoids."""
    kinds, blocks = list(config.layer_types), _blocks(config)
    indexed, window = blocks[kinds.index(_INDEXED)], blocks[kinds.index(_WINDOW)]
    return (
        _shape(indexed)
        | _shape(window, "_swa")
        | groups(config)
        | {
            "attention.head_count": [block.num_attention_heads for block in blocks],
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": indexed.q_lora_rank,
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [kind == _WINDOW for kind in kinds],
            "attention.indexer.head_count": config.index_n_heads,
            "attention.indexer.key_length": config.index_head_dim,
            "attention.indexer.top_k": config.index_topk,
            "attention.indexer.types": [kind == _INDEXED for kind in kinds],
            "rope.dimension_count": indexed.qk_rope_head_dim,
            "rope.freq_base": float(config.rope_parameters[_INDEXED]["rope_theta"]),
            "rope.freq_base_swa": float(config.rope_parameters[_WINDOW]["rope_theta"]),
            "leading_dense_block_count": num_dense(config),
            "expert_count": config.n_routed_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(config.norm_topk_prob),
            "expert_gating_func": SIGMOID,
        }
    )


def _blocks(config: Any) -> list[Any]:
    return [config.per_layer_config[i] for i in range(config.num_hidden_layers)]


def problem(config: Any) -> str | None:
    """What llama.cpp computes otherwise; None where it is nothing."""
    if set(config.layer_types) != {_INDEXED, _WINDOW}:
        return "an indexer in some blocks and a window in all others (layer_types)"  # else it ends
    blocks = _blocks(config)
    if len({(block.q_lora_rank, block.qk_rope_head_dim) for block in blocks}) > 1:
        return "queries of one rank and one number of turned dimensions in all blocks (swa_q_lora_rank and others)"
    shapes = {
        (kind, block.num_attention_heads, *_shape(block).values())
        for kind, block in zip(config.layer_types, blocks, strict=True)
    }
    if len(shapes) > 2:
        return "blocks of one kind alike (per_layer_config)"
    if any(values.get("rope_type", "default") != "default" for values in config.rope_parameters.values()):
        return "rotary positions without scaling (rope_type: default)"
    if config.shared_experts_intermediate_size != config.moe_intermediate_size:
        return "shared experts as wide as the others (shared_experts_intermediate_size)"
    return wide_heads(config) or dense_later(config)
