"""What mlx-lm's classes of mixtures expect of files and read of configurations, where it differs between families.

A family is here once its tiny random model, opened by mlx-lm, has given the logits of transformers.  A setting that
its class does not read is held to the value that the class computes with.  docs/serving.md lists those of its classes
that moeq does not write for, and why.

Source: mlx_lm/models/*.py of mlx-lm 0.32.2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from moeq.formats.mlx_family import MlxFamily, rope_of


def head_dim(config: Any) -> int:
    """Size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def num_dense(config: Any) -> int:
    """How many blocks at the beginning have no experts."""
    kinds = list(config.mlp_layer_types)
    return kinds.index("sparse") if "sparse" in kinds else len(kinds)


def full_attention_interval(config: Any) -> int:
    """Of how many blocks the last has full attention."""
    kinds = list(config.layer_types)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def irregular(config: Any) -> str | None:
    """Why the kinds of blocks are none that the interval says; None where they are."""
    number = full_attention_interval(config)
    regular = all((kind == "full_attention") == (i % number == number - 1) for i, kind in enumerate(config.layer_types))
    return None if regular else "full attention in every so-manieth block (layer_types)"


def turned(config: Any) -> float:
    """Share of a head's dimensions that turn."""
    return float(rope_of(config).get("partial_rotary_factor", 1.0))


def channels(conv: Tensor) -> Tensor:
    """A convolution of channels, [C, 1, K], as [C, K, 1]."""
    return conv.movedim(2, 1).contiguous()


def _kinds(kind: str, kinds: Any) -> list[int]:
    return [int(each == kind) for each in kinds]


def _two_shares(config: Any) -> str | None:
    shares = {values.get("partial_rotary_factor", 1.0) for values in config.rope_parameters.values()}
    return None if len(shares) == 1 else "one share of turned dimensions, and here blocks with a window have another"


def _shared_choices(config: Any) -> str | None:
    alone = set(config.indexer_types) == {"full"}
    return None if alone else "an indexer in each block, and here blocks share what one has chosen (indexer_types)"


# mlx-lm's words for kinds of Granite's blocks, and the largest number that JSON holds for it.
_GRANITE_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
_LARGEST = 3e38
SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_ALL_FULL: Mapping[str, tuple[Any, ...]] = {"sliding_window": (None,)}
ONE_ADDED = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight",
    ".k_norm.weight",
)  # fmt: skip
CONVOLUTION = {".conv1d.weight": channels}
LATENT = MlxFamily(
    computed={**SILU, "rope_interleave": (True,)}, has_tied_head=False, taken_apart=("kv_b_proj",)
)  # fmt: skip
_INDEXED = replace(LATENT, made={"first_k_dense_replace": num_dense}, rope_types=("default", "yarn"))
_GLM = MlxFamily(keys=("rope_scaling", "partial_rotary_factor", "use_qk_norm"), computed=SILU, has_tied_head=False)


def _of_full_attention(key: str) -> Any:
    """What blocks without a window have."""
    return lambda config: getattr(config.per_layer_config[config.layer_types.index("full_attention")], key)


FAMILIES: dict[str, MlxFamily] = {
    "mixtral": MlxFamily(computed={**SILU, **_ALL_FULL}),
    "qwen2_moe": MlxFamily(
        computed={
            **SILU, "norm_topk_prob": (False,), "qkv_bias": (True,), "use_sliding_window": (False,),
            "decoder_sparse_step": (1,), "mlp_only_layers": ([], None),
        },
        has_tied_head=False,
    ),
    "qwen3_moe": MlxFamily(
        keys=("num_experts", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "head_dim"),
        computed={**SILU, "attention_bias": (False,), "use_sliding_window": (False,)},
    ),
    "qwen3_next": MlxFamily(
        keys=("num_experts", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "head_dim"),
        made={"full_attention_interval": full_attention_interval, "partial_rotary_factor": turned},
        computed={**SILU, "attention_bias": (False,)}, changed=CONVOLUTION, refuses=irregular, one_added=ONE_ADDED,
    ),
    "olmoe": MlxFamily(keys=("num_experts",), computed={**SILU, "clip_qkv": (None,)}),
    "deepseek_v3": replace(LATENT, rope_types=("default", "yarn")),
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": replace(
        _INDEXED, keys=("rope_parameters",), rope_types=("default",), refuses=_shared_choices,
        made={
            "first_k_dense_replace": num_dense, "topk_method": lambda config: "noaux_tc",
            "scoring_func": lambda config: "sigmoid", "moe_layer_freq": lambda config: 1,
        },
    ),
    "glm4_moe_lite": LATENT,
    "mistral4": MlxFamily(
        keys=("rope_parameters",), computed={**SILU, "rope_interleave": (True,)}, taken_apart=("kv_b_proj",),
        rope_types=("yarn",),
    ),
    "deepseek_v2": MlxFamily(
        keys=("topk_method",),
        computed={**SILU, "norm_topk_prob": (False, None)},
        has_tied_head=False,
        rope_types=("yarn",),
    ),
    "glm4_moe": _GLM,
    "solar_open": replace(_GLM, made={"first_k_dense_replace": lambda config: 0, "partial_rotary_factor": turned}),
    "dots1": MlxFamily(experts="experts", computed={**SILU, **_ALL_FULL}),
    "exaone_moe": MlxFamily(
        keys=("layer_types", "sliding_window", "num_experts", "head_dim"), computed=SILU,
        made={"is_moe_layer": lambda config: [kind == "sparse" for kind in config.mlp_layer_types]},
    ),
    "phimoe": MlxFamily(
        keys=("router_jitter_noise",), has_tied_head=False,
        computed={**SILU, **_ALL_FULL, "attention_bias": (True,), "lm_head_bias": (True,)},
    ),
    "granitemoe": MlxFamily(computed=SILU),
    "granitemoehybrid": MlxFamily(
        made={
            "layer_types": lambda config: [_GRANITE_KINDS.get(kind, kind) for kind in config.layer_types],
            "position_embedding_type": lambda config: "rope" if config.position_embedding_type == "rope" else "nope",
            "time_step_limit": lambda config: [min(float(each), _LARGEST) for each in config.time_step_limit],
        },
        computed={**SILU, "mamba_n_groups": (1,)}, changed=CONVOLUTION,
    ),
    "lfm2_moe": MlxFamily(
        renamed={"feed_forward.w1": "feed_forward.gate_proj", "feed_forward.w2": "feed_forward.down_proj",
                 "feed_forward.w3": "feed_forward.up_proj"},
        computed={"tie_word_embeddings": (True,)},
    ),
    "minimax_m2": MlxFamily(
        made={
            "rotary_dim": lambda config: int(config.head_dim * turned(config)),
            "shared_intermediate_size": lambda config: 0,
        },
        computed=SILU,
    ),
    "mimo_v2_flash": MlxFamily(
        keys=("attention_value_scale", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"),
        made={
            "hybrid_layer_pattern": lambda config: _kinds("sliding_attention", config.layer_types),
            "moe_layer_freq": lambda config: _kinds("sparse", config.mlp_layer_types),
            "add_swa_attention_sink_bias": lambda config: True,
            "add_full_attention_sink_bias": lambda config: False,
            "sliding_window_size": lambda config: config.sliding_window,
            "swa_num_attention_heads": lambda config: config.num_attention_heads,
            "swa_num_key_value_heads": lambda config: 2 * config.num_key_value_heads,
            "swa_head_dim": lambda config: config.head_dim,
            "swa_v_head_dim": lambda config: config.v_head_dim,
            "rope_theta": lambda config: config.rope_parameters["full_attention"]["rope_theta"],
            "swa_rope_theta": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
            "partial_rotary_factor": lambda config: config.rope_parameters["full_attention"].get(
                "partial_rotary_factor", 1.0
            ),
            "layernorm_epsilon": lambda config: config.rms_norm_eps,
            "n_shared_experts": lambda config: None,
            "topk_method": lambda config: "noaux_tc",
            "scoring_func": lambda config: "sigmoid",
        },
        computed={**SILU, "attention_bias": (False,)}, has_tied_head=False, refuses=_two_shares,
    ),
    "kimi_linear": MlxFamily(
        renamed={"block_sparse_moe.": "mlp.", "_conv1d.weight": "_conv.conv.weight", "mlp.gate.e_score": "mlp.e_score"},
        made={
            "rope_theta": lambda config: 10000.0,  # required, and read by nothing
            "head_dim": head_dim,
            "model_max_length": lambda config: config.max_position_embeddings,
            "num_experts": lambda config: config.num_local_experts,
            "num_experts_per_token": lambda config: config.num_experts_per_tok,
            "num_shared_experts": lambda config: config.n_shared_experts,
            "moe_renormalize": lambda config: config.norm_topk_prob,
            "num_expert_group": lambda config: config.n_group,
            "first_k_dense_replace": num_dense,
            "linear_attn_config": lambda config: {
                "head_dim": config.linear_head_dim, "num_heads": config.linear_num_heads,
                "short_conv_kernel_size": config.linear_conv_kernel_dim,
                "kda_layers": [i + 1 for i, kind in enumerate(config.layer_types) if kind == "linear_attention"],
            },
        },
        computed={**SILU, "q_lora_rank": (None,)}, taken_apart=("kv_b_proj",), changed={"_conv.conv.weight": channels},
    ),
    "afmoe": MlxFamily(experts="experts", computed=SILU),
    "gemma4_text": MlxFamily(
        experts="experts.switch_glu",
        keys=("layer_types", "rope_parameters", "sliding_window", "num_kv_shared_layers", "final_logit_softcapping"),
        made={
            "global_head_dim": _of_full_attention("head_dim"),
            "num_global_key_value_heads": _of_full_attention("num_key_value_heads"),
        },
        computed={
            "hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,),
            "use_bidirectional_attention": (None, "vision", False), "num_kv_shared_layers": (0,),
        },
        rope_types=("default", "proportional"),
    ),
    "laguna": MlxFamily(computed=SILU),
    "mellum": MlxFamily(keys=("num_experts",), computed=SILU),
    "nemotron_h": MlxFamily(leaves={"up_proj": "fc1", "down_proj": "fc2"}, computed={"mlp_hidden_act": ("relu2",)}),
}  # fmt: skip
