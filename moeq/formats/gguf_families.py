"""Families of models whose GGUF files were run in llama.cpp against transformers: names, keys, and what is refused.

A name that is not here is the one that the ``gguf`` package's own table of names gives.  ``tests/formats/test_gguf_runs``
runs each family; a family that was not run is not written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeq.formats import gguf_metadata as keys
from moeq.formats.gguf_metadata import Describe
from moeq.formats.gguf_pieces import Pieces, latent_parts, turned_keys, turned_queries, vector

# (option, the value that llama.cpp computes with, whatever a file says)
Fixed = tuple[str, Any]
_SILU: Fixed = ("hidden_act", "silu")
_NO_BIAS: Fixed = ("attention_bias", False)
_NO_WINDOW: Fixed = ("sliding_window", None)


@dataclass(frozen=True)
class Family:
    """How a family of transformers is told to llama.cpp.

    Attributes:
        architecture: llama.cpp's name.
        describe: Keys beyond the common ones.
        fixed: Options that llama.cpp has no key for, each with the one value that it computes with; an option that a
            configuration lacks has it.
        pieces: Of tensors that do not go as they are: by what follows the number of the block.
        own_head: llama.cpp does not take the embedding for a head that is missing.
    """

    architecture: str
    describe: Describe
    fixed: tuple[Fixed, ...] = (_SILU, _NO_BIAS)
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    own_head: bool = False
    refuses: Callable[[Any], str | None] = lambda config: None


def _grouped_heads(config: Any) -> str | None:
    same = config.num_key_value_heads == config.num_attention_heads
    return None if same else "its norm of keys is as wide as that of queries, and here heads share keys"


def _grouped_experts(config: Any) -> str | None:
    if config.topk_method == "group_limited_greedy" and (config.n_group or 1) > 1:
        return "the best groups by the sum of two scores, and here they are the best by one (group_limited_greedy)"
    return _unranked(config)


def _unranked(config: Any) -> str | None:
    """llama.cpp knows models without a rank of queries by their 26 or 27 blocks."""
    if (config.q_lora_rank is None) == (config.num_hidden_layers in (26, 27)):
        return None
    return f"with 26 or 27 blocks q_lora_rank is null, otherwise a number, and here it is {config.q_lora_rank}"


_NEIGHBOURS: Mapping[str, Pieces] = {
    "self_attn.q_proj": turned_queries("attn_q.weight"),
    "self_attn.k_proj": turned_keys("attn_k.weight"),
}
_LATENT: Mapping[str, Pieces] = {"self_attn.kv_b_proj": latent_parts}
_EXPERTS = keys.experts("num_experts", "moe_intermediate_size")
_LOCAL = keys.experts("num_local_experts", "intermediate_size")
_ALL_SPARSE: tuple[Fixed, ...] = (("decoder_sparse_step", 1), ("mlp_only_layers", []))

FAMILIES: dict[str, Family] = {
    "mixtral": Family("llama", _LOCAL, (_SILU, _NO_BIAS, _NO_WINDOW), _NEIGHBOURS),
    "qwen2_moe": Family(
        "qwen2moe", keys.qwen2_moe, (_SILU, ("norm_topk_prob", False), _NO_WINDOW, *_ALL_SPARSE),
        {"mlp.shared_expert_gate": vector("ffn_gate_inp_shexp.weight")}, own_head=True,
    ),
    "qwen3_moe": Family(
        "qwen3moe", _EXPERTS, (_SILU, _NO_BIAS, ("norm_topk_prob", True), _NO_WINDOW, *_ALL_SPARSE)
    ),
    "olmoe": Family(
        "olmoe", keys.experts("num_experts", "intermediate_size"),
        (_SILU, _NO_BIAS, ("norm_topk_prob", False), ("clip_qkv", None)), own_head=True,
        refuses=_grouped_heads,
    ),
    "deepseek_v2": Family(
        "deepseek2", keys.deepseek, (_SILU, _NO_BIAS, ("mlp_bias", False), ("norm_topk_prob", False)), _LATENT,
        refuses=_grouped_experts,
    ),
    "deepseek_v3": Family(
        "deepseek2", keys.deepseek_v3, (_SILU, _NO_BIAS, ("rope_interleave", True)), _LATENT, refuses=_unranked,
    ),
}  # fmt: skip
