"""Qwen4-Exp as llama.cpp reads it: Qwen3.5's delta rule, several residual streams, an indexer, hashed n-grams.

In place of norms each block mixes its residual streams by a gate of low rank and adds what it computes to each by a
weight of its own.  Norms multiply by 1 + weight but for the one of the delta rule.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeq.formats.gguf_mamba import channels
from moeq.formats.gguf_metadata import experts
from moeq.formats.gguf_pieces import Piece, Pieces, made, renamed
from moeq.formats.gguf_recurrent import QWEN3_5, plus_one
from moeq.formats.gguf_rope import Metadata, sections_in_turn


def _mixer(path: str, name: str) -> Mapping[str, Pieces]:
    """How residual streams become one, and where what a block computes is added."""
    return {
        f"{path}.hc_norm.weight": made(f"{name}_norm.weight", plus_one),
        f"{path}.input_mix_weight_down": renamed(f"{name}_down.weight"),
        f"{path}.input_mix_weight_up": renamed(f"{name}_up.weight"),
        f"{path}.block_inject_weight": renamed(f"{name}_inject.weight"),
    }


def _index_projection(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """Queries of the indexer, and its one key."""
    num_queries = config.indexer_n_heads * config.indexer_head_dim
    rows = torch.arange(shape[0])
    return [Piece("indexer.q_proj.weight", rows[:num_queries]), Piece("indexer.k_proj.weight", rows[num_queries:])]


_TABLE = Piece("per_layer_token_embd.weight", of_block=False)
QWEN4_EXP: Mapping[str, Pieces] = {
    **QWEN3_5,
    **_mixer("attn_hyper_connection", "hc_attn"),
    **_mixer("mlp_hyper_connection", "hc_ffn"),
    **_mixer("model.hyper_connection_mixer", "output_hc"),
    "self_attn.indexer.index_qk_proj": _index_projection,
    "self_attn.indexer.q_layernorm.weight": made("indexer.q_norm.weight", plus_one),
    "self_attn.indexer.k_layernorm.weight": made("indexer.k_norm.weight", plus_one),
    "ple.ple_embedding.ngram_embedding.weight": lambda config, shape: [_TABLE],
    "ple.key_proj": renamed("ple_key.weight"),
    "ple.value_proj": renamed("ple_value.weight"),
    "ple.norm_key.weight": made("ple_norm_key.weight", plus_one),
    "ple.norm_query.weight": made("ple_norm_query.weight", plus_one),
    "ple.norm_conv.weight": made("ple_norm_conv.weight", plus_one),
    "ple.conv1d.weight": made("ple_conv1d.weight", channels),
}

# Tensors of whole numbers that are keys of the file: how a token and those before it become rows of the table.
HASHES = {
    "ple.ple_embedding.layer_multipliers": "ple.layer_multipliers",
    "ple.ple_embedding.ngram_heads_offsets": "ple.head_offsets",
    "ple.ple_embedding.ngram_heads_vocab_sizes": "ple.head_vocab_sizes",
}


def qwen4_exp(config: Any) -> Metadata:
    """Qwen4-Exp: residual streams, attention to whole blocks that an indexer chooses, n-grams in one block or none."""
    keys = experts("num_experts", "moe_intermediate_size")(config)
    linear = [kind == "linear_attention" for kind in config.layer_types]
    return keys | {
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        **sections_in_turn(keys),
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "attention.recurrent_layers": linear,
        "hyper_connection.count": config.hc_count,
        "hyper_connection.low_rank": config.hc_lowrank,
        "attention.indexer.head_count": config.indexer_n_heads,
        "attention.indexer.key_length": config.indexer_head_dim,
        "attention.indexer.top_k": config.indexer_budget,
        "attention.compress_ratios": [0 if each else config.indexer_compress_ratio for each in linear],
        **_n_grams(config),
    }


def _n_grams(config: Any) -> Metadata:
    if not config.ple_layer_ids:
        return {}
    heads = (config.ngram_size - 1) * config.heads_per_ngram
    ends = config.eos_token_id
    return {
        "ple.layers": [number - 1 for number in config.ple_layer_ids],
        "ple.ngram_size": config.ngram_size,
        "ple.heads_per_ngram": config.heads_per_ngram,
        "ple.conv_kernel": config.ple_conv_kernel_size,
        "ple.eos_token_id": ends[0] if isinstance(ends, list) else ends,
        "embedding_length_per_layer_input": config.ple_embed_dim // heads,
    }


def images(config: Any) -> Metadata:
    """Of the wrapper: which token n-grams have in place of an image."""
    return {"ple.image_token_id": config.image_token_id} if config.text_config.ple_layer_ids else {}


def problem(config: Any) -> str | None:
    """Why llama.cpp would compute a model otherwise, or not open it; None where it would not."""
    if set(config.layer_types) != {"linear_attention", "indexed_attention"}:
        return "blocks of the delta rule beside blocks of attention (layer_types)"
    if (key := config.linear_key_head_dim) != (value := config.linear_value_head_dim):
        return f"keys and values of the delta rule of one width, and here they are {key} and {value} wide"
    if config.indexer_compress_ratio < 2:
        return "an indexer of blocks of two tokens or more (indexer_compress_ratio)"
    return _other_n_grams(config) if config.ple_layer_ids else None


def _other_n_grams(config: Any) -> str | None:
    if len(config.ple_layer_ids) > 1:
        return "n-grams in one block (ple_layer_ids)"
    if config.ple_embed_dim != config.hidden_size:
        return f"n-grams as wide as the residual stream, and here they are {config.ple_embed_dim} wide (ple_embed_dim)"
    if config.ngram_size > 8 or (config.ngram_size - 1) * config.heads_per_ngram > 64:
        return "n-grams of 8 tokens at most by 64 tables at most (ngram_size, heads_per_ngram)"
    return None
