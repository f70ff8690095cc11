"""Families whose files name, cut or order what mlx-lm's classes hold in another way, or that another's class computes.

Rows of a quantized weight move exactly: see ``moeq.formats.mlx_modules``.  Source: ``bailing_moe.py``,
``bailing_moe_v3.py`` and ``minimax_m3_vl.py`` of mlx-lm 0.32.2.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeq.formats.mlx_families import SILU, channels, full_attention_interval, head_dim, num_dense, turned
from moeq.formats.mlx_family import MlxFamily


def _group_size(config: Any) -> int:
    """Of how many blocks the last has full attention, as Bailing's class counts them."""
    return min(full_attention_interval(config), config.num_hidden_layers + 1)


def _bailing_otherwise(config: Any) -> str | None:
    size, count = _group_size(config), config.num_hidden_layers
    full = [(index + 1) % size == 0 or index >= count // size * size for index in range(count)]
    if [kind == "full_attention" for kind in config.layer_types] != full:
        return "full attention in every so-manieth block and in those behind the last full group (layer_types)"
    if config.linear_num_heads != config.num_attention_heads:
        return "as many heads in the delta rule as in attention (linear_num_heads)"
    return None


def _bailing_name(key: str, config: Any) -> str:
    """A key; the outputs of both kinds of attention have one name in transformers' files."""
    parts = key.split(".")
    if parts[3:5] == ["attention", "dense"] and config.layer_types[int(parts[2])] == "linear_attention":
        return key.replace(".attention.dense", ".attention.o_proj")
    return key


def _ernie_otherwise(config: Any) -> str | None:
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    if config.moe_layer_interval != 1 or last not in (-1, config.num_hidden_layers - 1) or first < 0:
        return "experts in every block from one on (moe_layer_interval, moe_layer_end_index)"
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "heads that are together as wide as the model (head_dim)"
    return None if config.moe_k > 1 else "the probability of a single expert as its weight, and here it is 1 (moe_k)"


def _halves(num_rows: int, config: Any) -> Tensor:
    """Order of rows for rotary embeddings that turn the halves of a head, where they turn neighbours."""
    return torch.arange(num_rows).view(-1, head_dim(config) // 2, 2).transpose(1, 2).flatten()


MINIMAX_M3: Mapping[str, Any] = {
    "split": {"gate_up_proj": ("gate_proj", "up_proj")},
    "made": {
        "rotary_dim": lambda config: int(head_dim(config) * turned(config)),
        "layer_types": lambda config: list(config.layer_types),
        "mlp_layer_types": lambda config: list(config.mlp_layer_types),
        "use_qk_norm": lambda config: True,
        "use_gemma_norm": lambda config: True,
    },
    "adds_one": True,
}

REARRANGED: dict[str, MlxFamily] = {
    "bailing_hybrid": MlxFamily(
        moved=_bailing_name, taken_apart=("kv_b_proj",), changed={"_conv1d.weight": channels},
        made={
            "architectures": lambda config: ["BailingMoeV3ForCausalLM"],  # by which mlx-lm tells it from Ling 2.5
            "layer_group_size": _group_size,
            "head_dim": lambda config: config.linear_head_dim,
            "short_conv_kernel_size": lambda config: config.linear_conv_kernel_dim,
            "first_k_dense_replace": num_dense,
            "num_experts": lambda config: config.num_local_experts,
            "num_experts_per_tok": lambda config: config.num_experts_per_tok,
            "num_shared_experts": lambda config: config.n_shared_experts,
            "moe_shared_expert_intermediate_size": lambda config: config.moe_intermediate_size,
            "n_group": lambda config: config.n_group,
            "max_position_embeddings": lambda config: config.max_position_embeddings,
            "q_lora_rank": lambda config: None,
            "no_kda_lora": lambda config: True,
            "rope_interleave": lambda config: True,
        },
        computed={**SILU, "kda_safe_gate": (True,), "norm_topk_prob": (True,), "attention_bias": (False,)},
        refuses=_bailing_otherwise,
    ),
    # Its own class forgets the correction biases; that of Ling 1 computes with them.
    "ernie4_5_moe": MlxFamily(
        renamed={
            "embed_tokens": "word_embeddings", ".self_attn.": ".attention.", ".o_proj": ".dense",
            ".mlp.gate.weight": ".mlp.gate.gate_proj.weight",
            ".moe_statics.e_score_correction_bias": ".gate.expert_bias",
        },
        merged=dict.fromkeys(("q_proj", "k_proj", "v_proj"), "query_key_value"),
        rows={"q_proj": _halves, "k_proj": _halves},
        # The router's product is in float32 in transformers, and in the dtype of its weight there.
        changed={".gate.expert_bias": torch.Tensor.flatten, ".gate.gate_proj.weight": torch.Tensor.float},
        made={
            "num_experts": lambda config: config.moe_num_experts,
            "num_experts_per_tok": lambda config: config.moe_k,
            "num_shared_experts": lambda config: config.moe_num_shared_experts,
            "moe_shared_expert_intermediate_size": lambda config: config.moe_intermediate_size,
            "first_k_dense_replace": lambda config: config.moe_layer_start_index,
            "moe_router_enable_expert_bias": lambda config: True,
            "score_function": lambda config: "softmax",
            "norm_topk_prob": lambda config: True,
            "n_group": lambda config: 1,
            "routed_scaling_factor": lambda config: 1.0,
        },
        computed={**SILU, "use_bias": (False,), "moe_norm_min": (1e-12,)}, refuses=_ernie_otherwise,
        written_as="bailing_moe",
    ),
    "minimax_m3_vl_text": MlxFamily(
        renamed={
            "model.": "language_model.model.", "lm_head": "language_model.lm_head", "indexer.": "index_",
            "mlp.gate.weight": "block_sparse_moe.gate.weight", "mlp.gate.e_score": "block_sparse_moe.e_score",
            "mlp.switch_mlp": "block_sparse_moe.switch_mlp", "mlp.shared_experts": "block_sparse_moe.shared_experts",
        },
        inside_of="minimax_m3_vl", **MINIMAX_M3,
    ),
}  # fmt: skip
