"""Gemma 4 as llama.cpp reads it: heads of another size in blocks without a window, and a dense part beside experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moeq.formats.gguf_pieces import Piece, Pieces, renamed
from moeq.formats.gguf_rope import Metadata
from moeq.formats.gguf_windows import windows

# A divisor of the frequency with which a pair of dimensions turns that leaves it where it is.
_STILL = 1e30


def _norm_and_divisors(config: Any, shape: tuple[int, ...]) -> Sequence[Piece]:
    """The last norm, and beside it what divides the frequencies of blocks without a window: of no tensor of the model.

    In these blocks the first pairs of a head turn and the others do not, with frequencies as if all did.
    """
    del shape
    half = _head_dims(config)["full_attention"] // 2
    turned = int(config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0) * half)
    divisors = torch.where(torch.arange(half) < turned, 1.0, _STILL)
    return [Piece("output_norm.weight"), Piece("rope_freqs.weight", shape=(half,), values=lambda norm: divisors)]


GEMMA4: Mapping[str, Pieces] = {
    "model.norm.weight": _norm_and_divisors,
    "layer_scalar": renamed("layer_output_scale.weight"),
    "router.scale": renamed("ffn_gate_inp.scale"),
    "router.per_expert_scale": renamed("ffn_down_exps.scale"),
    "experts.gate_proj": renamed("ffn_gate_exps.weight"),
    "experts.up_proj": renamed("ffn_up_exps.weight"),
}


def gemma4(config: Any) -> Metadata:
    """Gemma 4."""
    heads, rope = _head_dims(config), config.rope_parameters
    full, window = heads["full_attention"], heads.get("sliding_attention", heads["full_attention"])
    return windows(config) | {
        "attention.head_count_kv": [
            config.per_layer_config[i].num_key_value_heads for i in range(config.num_hidden_layers)
        ],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": window,
        "attention.value_length_swa": window,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "final_logit_softcapping": float(config.final_logit_softcapping or 0),  # without the key it is 30
        "rope.dimension_count": full,
        "rope.dimension_count_swa": window,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def problem(config: Any) -> str | None:
    """What llama.cpp computes otherwise; None where it has nothing."""
    rope = config.rope_parameters
    if "sliding_attention" not in config.layer_types:
        return "a window in some blocks (layer_types)"
    if rope["full_attention"].get("rope_type") != "proportional" or rope["full_attention"].get("factor", 1.0) != 1.0:
        return "proportional rotary positions without a factor in blocks that have no window (rope_parameters)"
    if rope["sliding_attention"].get("rope_type", "default") != "default":
        return "rotary positions without scaling in blocks that have a window (rope_parameters)"
    if config.use_bidirectional_attention == "all":
        return "attention to what came before (use_bidirectional_attention)"
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        return "embeddings of blocks for all of the vocabulary (vocab_size_per_layer_input)"
    return None


def _head_dims(config: Any) -> dict[str, int]:
    """Size of a head by kind of block."""
    kinds = config.layer_types
    return {kind: int(config.per_layer_config[kinds.index(kind)].head_dim) for kind in dict.fromkeys(kinds)}
