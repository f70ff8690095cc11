"""GLM-5.3 as llama.cpp reads it: Kimi's delta rule beside latent attention without positions, several residual streams.

The indexer of attention chooses pools of tokens.  Residual streams are mixed by matrices whose rows and columns sum to
one, which each token makes of its own.
"""

from collections.abc import Mapping
from typing import Any

from moeq.formats.gguf_mamba import decay
from moeq.formats.gguf_metadata import SIGMOID, groups, indexer, latent, num_dense
from moeq.formats.gguf_pieces import Pieces, made, renamed
from moeq.formats.gguf_recurrent import KIMI
from moeq.formats.gguf_rope import Metadata


def _streams(path: str, name: str) -> Mapping[str, Pieces]:
    """Weights, biases and scales of what residual streams are mixed by."""
    return {f"{path}.{part}": renamed(f"{name}_{part}.weight") for part in ("fn", "base", "scale")}


GLM5_NEXT: Mapping[str, Pieces] = {
    **KIMI,
    **_streams("attn_hc", "hc_attn"),
    **_streams("ffn_hc", "hc_ffn"),
    "self_attn.forget_gate.A_log": made("ssm_a", decay),
    "self_attn.indexer.wq_b": renamed("indexer.attn_q_b.weight"),
    "self_attn.indexer.wk": renamed("indexer.attn_k.weight"),
    "self_attn.indexer.weights_proj": renamed("indexer.proj.weight"),
    "self_attn.indexer.k_norm.weight": renamed("indexer.k_norm.weight"),
    "self_attn.indexer.k_norm.bias": renamed("indexer.k_norm.bias"),
    "self_attn.indexer.index_kpool_compress_gate": renamed("indexer_compressor_gate.weight"),
    "self_attn.indexer.index_kpool_compress_ape": renamed("indexer_compressor_ape.weight"),
}
_EPSILON = 1e-6  # of the norm of the indexer's keys


def glm5_next(config: Any) -> Metadata:
    """GLM-5.3: the delta rule of Kimi Linear, latent attention to pools of tokens, gates that are cut off."""
    limit, bound = config.swiglu_limit, config.linear_lower_bound
    limits = None if limit is None else [float(limit)] * config.num_hidden_layers
    return {
        **latent(config),
        **groups(config),
        **indexer(config),
        "rope.dimension_count": config.qk_rope_head_dim,
        "expert_gating_func": SIGMOID,
        "attention.head_count_kv": [0 if kind == "linear_attention" else 1 for kind in config.layer_types],
        "attention.layer_norm_epsilon": _EPSILON,
        "attention.indexer.kpool": config.index_kpool,
        "attention.indexer.kpool_select_tail": bool(config.index_kpool_always_select_tail),
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "kda.head_dim": config.linear_head_dim,
        "kda.gate_lower_bound": None if bound is None else float(bound),
        "swiglu_clamp_exp": limits,
        "swiglu_clamp_shexp": limits,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hyper_connection.epsilon": float(config.hc_eps),
    }


def problem(config: Any) -> str | None:
    """Why llama.cpp would compute a model otherwise, or not open it; None where it would not."""
    if set(config.layer_types) != {"linear_attention", "indexed_attention"}:
        return "blocks of the delta rule beside blocks of attention (layer_types)"
    if config.linear_num_heads != config.num_attention_heads:
        return "as many heads of the delta rule as of attention (linear_num_heads)"
    if config.hc_mult != 4:
        return f"four residual streams, and here they are {config.hc_mult} (hc_mult)"
    if config.index_kpool < 2:
        return "an indexer of pools of two tokens or more (index_kpool)"
    if not config.index_kpool_always_select_tail:
        return "attention to the last tokens that are no whole pool (index_kpool_always_select_tail)"
    if "dense" in config.mlp_layer_types[num_dense(config) :]:
        return "dense blocks before all mixtures (mlp_layer_types)"
    return None
