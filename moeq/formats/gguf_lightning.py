"""Blocks with lightning attention, linear and decaying, in place of attention, as llama.cpp reads them: MiniMax-01.

llama.cpp computes the decay of each head from the numbers of heads and blocks, as transformers does; it adds to the
output of the norms, each time with one factor.
"""

from collections.abc import Mapping
from typing import Any

from moeq.formats.gguf_metadata import experts
from moeq.formats.gguf_pieces import Pieces, nothing, renamed
from moeq.formats.gguf_recurrent import both_kinds
from moeq.formats.gguf_rope import Metadata, head_dim

_DECAYS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
MINIMAX: Mapping[str, Pieces] = {
    "self_attn.qkv_proj": renamed("attn_qkv.weight"),
    "self_attn.output_gate": renamed("attn_gate.weight"),
    "self_attn.out_proj": renamed("attn_output.weight"),
    "self_attn.norm.weight": renamed("attn_norm_2.weight"),
    **{f"self_attn.{name}": nothing for name in _DECAYS},
}


def minimax(config: Any) -> Metadata:
    """MiniMax-01: which blocks have lightning attention, and the factor of what a block adds to."""
    return experts("num_local_experts", "intermediate_size")(config) | {
        "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
        "residual_scale": float(config.mlp_alpha_factor),
    }


def problem(config: Any) -> str | None:
    """What else llama.cpp computes otherwise; None where it is nothing."""
    if missing := both_kinds(config):
        return missing
    if config.layer_types[-1] != "full_attention":  # whose decay transformers divides by another number
        return "full attention in the last block (layer_types)"
    if len({config.full_attn_alpha_factor, config.linear_attn_alpha_factor, config.mlp_alpha_factor}) > 1:
        return "one factor of what attention and experts are added to (full_attn_alpha_factor and others)"
    turned = config.rope_parameters.get("partial_rotary_factor", 1.0) * head_dim(config)
    if turned != head_dim(config) or getattr(config, "rotary_dim", turned) != turned:
        return "rotary positions of whole heads, as transformers does whatever rotary_dim says, and here it is another"
    return None
