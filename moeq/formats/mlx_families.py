"""What mlx-lm's classes of mixtures expect of files and read of configurations, where it differs between families.

A family is here once its tiny random model, opened by mlx-lm, has given the logits of transformers.  A setting that
its class does not read is held to the value that the class computes with.  Left out, as read wrongly or rounded on the
way (mlx-lm 0.32): ernie4_5_moe and jamba (other logits than transformers), qwen3_next (one is added to norms in the
dtype of the files, which "native" allows for qwen3_5_moe), gpt_oss (expects MXFP4).

Source: mlx_lm/models/*.py of mlx-lm 0.32.2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.quant.carrier import CarrierMode


@dataclass(frozen=True)
class MlxFamily:
    """A family as mlx-lm reads it.

    Attributes:
        experts: Name, below their block's module, under which all experts of a projection are one tensor.
        leaves: Names of projections there, where they are not ours.
        renamed: Parts of the files' names that its class calls otherwise.
        keys: Of the configuration, which its class requires and sources need not have.
        made: The same, made of the configuration.
        computed: The values with which it computes, of settings that it does not read.
        has_tied_head: Whether it reads ``tie_word_embeddings``.
        rope_types: Rotary embeddings that it computes.
        taken_apart: Last parts of names of linears that it takes apart, which rounds them where they are quantized:
            they are written dequantized.
        language_model: Of a wrapper, of which mlx-lm reads the language model alone: the family that this has to be.
            Names and settings are of it. "" where there is no wrapper.
        made_beside: As ``made``, of the wrapper's own configuration.
        written_as: Of a wrapper that it has no class for: the ``model_type`` of the class that computes what its
            language model does. The folder is one of that, as if there were no wrapper.
        changed: Made of tensors that it holds otherwise, by endings of their names.
        one_added: Endings of names of norms to which it wants 1 added: exact in float32 alone.
        refuses: What else a configuration may have that it computes otherwise; None where it has nothing.
    """

    experts: str = "switch_mlp"
    leaves: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    made: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    computed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_tied_head: bool = True
    rope_types: tuple[str, ...] = ("default",)
    taken_apart: tuple[str, ...] = ()
    language_model: str = ""
    made_beside: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    written_as: str = ""
    changed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    one_added: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] = lambda config: None

    def change(self, key: str) -> Callable[[Tensor], Tensor] | None:
        """What is made of a tensor of a name; None where it goes as it is."""
        if key.endswith(self.one_added or ("nothing",)):
            return lambda weight: (weight.float() + 1.0).to(weight.dtype)
        return next((make for ending, make in self.changed.items() if key.endswith(ending)), None)


_SILU = {"hidden_act": ("silu",)}
_ALL_FULL = {"sliding_window": (None,)}
_LATENT = MlxFamily(
    computed={**_SILU, "rope_interleave": (True,)}, has_tied_head=False, taken_apart=("kv_b_proj",)
)  # fmt: skip


# Where wrappers have their language model, in files and in mlx-lm.
_INSIDE = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}
# The same where the language model is written alone.
_ALONE = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head": "lm_head"}
_CHANNELS = {".conv1d.weight": lambda conv: conv.movedim(2, 1).contiguous()}
_ONE_ADDED = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight",
)  # fmt: skip


def _of_full_attention(key: str) -> Callable[[Any], Any]:
    """What blocks without a window have."""
    return lambda config: getattr(config.per_layer_config[config.layer_types.index("full_attention")], key)


_GEMMA = MlxFamily(
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
)  # fmt: skip


def _interval(config: Any) -> int:
    """Of how many blocks the last has full attention."""
    kinds = list(config.layer_types)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def _irregular(config: Any) -> str | None:
    number = _interval(config)
    regular = all((kind == "full_attention") == (i % number == number - 1) for i, kind in enumerate(config.layer_types))
    return None if regular else "full attention in every so-manieth block (layer_types)"


def _rotary_dim(config: Any) -> int:
    return int(config.head_dim * rope_of(config).get("partial_rotary_factor", 1.0))


FAMILIES: dict[str, MlxFamily] = {
    "mixtral": MlxFamily(computed={**_SILU, **_ALL_FULL}),
    "qwen2_moe": MlxFamily(
        computed={
            **_SILU, "norm_topk_prob": (False,), "qkv_bias": (True,), "use_sliding_window": (False,),
            "decoder_sparse_step": (1,), "mlp_only_layers": ([], None),
        },
        has_tied_head=False,
    ),
    "qwen3_moe": MlxFamily(
        keys=("num_experts", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "head_dim"),
        computed={**_SILU, "attention_bias": (False,), "use_sliding_window": (False,)},
    ),
    "olmoe": MlxFamily(keys=("num_experts",), computed={**_SILU, "clip_qkv": (None,)}),
    "deepseek_v3": replace(_LATENT, rope_types=("default", "yarn")),
    "glm4_moe_lite": _LATENT,
    "deepseek_v2": MlxFamily(
        keys=("topk_method",),
        computed={**_SILU, "norm_topk_prob": (False, None)},
        has_tied_head=False,
        rope_types=("yarn",),
    ),
    "glm4_moe": MlxFamily(
        keys=("rope_scaling", "partial_rotary_factor", "use_qk_norm"), computed=_SILU, has_tied_head=False
    ),
    "dots1": MlxFamily(experts="experts", computed={**_SILU, **_ALL_FULL}),
    "granitemoe": MlxFamily(computed=_SILU),
    "lfm2_moe": MlxFamily(
        renamed={"feed_forward.w1": "feed_forward.gate_proj", "feed_forward.w2": "feed_forward.down_proj",
                 "feed_forward.w3": "feed_forward.up_proj"},
        computed={"tie_word_embeddings": (True,)},
    ),
    "minimax_m2": MlxFamily(
        made={"rotary_dim": _rotary_dim, "shared_intermediate_size": lambda config: 0},
        computed=_SILU,
    ),
    "afmoe": MlxFamily(experts="experts", computed=_SILU),
    "qwen3_vl_moe": MlxFamily(
        renamed=_INSIDE, keys=("num_experts", "mlp_only_layers", "decoder_sparse_step", "head_dim"),
        made={"norm_topk_prob": lambda config: True},
        computed={**_SILU, "attention_bias": (False,)}, has_tied_head=False, language_model="qwen3_vl_moe_text",
    ),
    "qwen3_5_moe": MlxFamily(
        renamed=_INSIDE, made={"full_attention_interval": _interval},
        computed={**_SILU, "attention_bias": (False,)}, language_model="qwen3_5_moe_text",
        changed={".conv1d.weight": lambda conv: conv.movedim(2, 1).contiguous()}, refuses=_irregular,
        one_added=(".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight",
                   ".q_norm.weight", ".k_norm.weight"),
    ),
    "kimi_k25": replace(_LATENT, rope_types=("default", "yarn"), language_model="deepseek_v3"),
    "gemma4_text": _GEMMA,
    "gemma4": replace(
        _GEMMA, renamed=_INSIDE, language_model="gemma4_text",
        made_beside={"vocab_size": lambda config: config.get_text_config().vocab_size},
    ),
    "laguna": MlxFamily(computed=_SILU),
    "mellum": MlxFamily(keys=("num_experts",), computed=_SILU),
    "nemotron_h": MlxFamily(leaves={"up_proj": "fc1", "down_proj": "fc2"}, computed={"mlp_hidden_act": ("relu2",)}),
}  # fmt: skip


def _num_dense(config: Any) -> int:
    kinds = list(config.mlp_layer_types)
    return kinds.index("sparse") if "sparse" in kinds else len(kinds)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_QWEN = FAMILIES["qwen3_moe"]
_MISTRAL = MlxFamily(keys=("rope_parameters", "qk_head_dim", "head_dim"), computed={**_SILU, "rope_interleave": (True,)}, taken_apart=("kv_b_proj",), rope_types=("yarn",))
_OCR = MlxFamily(renamed=_ALONE, written_as="deepseek", language_model="deepseek_ocr2_text",
  made={"first_k_dense_replace": _num_dense, "moe_layer_freq": lambda c: 1},
  computed={**_SILU, "topk_method": ("greedy",), "mlp_bias": (False,), "routed_scaling_factor": (1.0,)}, has_tied_head=False)
FAMILIES |= {
    "solar_open": replace(FAMILIES["glm4_moe"], made={"first_k_dense_replace": lambda c: 0, "partial_rotary_factor": lambda c: rope_of(c).get("partial_rotary_factor", 1.0)}),
    "exaone_moe": MlxFamily(made={"is_moe_layer": lambda c: [k == "sparse" for k in c.mlp_layer_types]}, keys=("layer_types", "sliding_window", "num_experts", "head_dim"), computed=_SILU),
    "phimoe": MlxFamily(keys=("router_jitter_noise",), computed={**_SILU, **_ALL_FULL, "attention_bias": (True,), "lm_head_bias": (True,)}, has_tied_head=False),
    "granitemoehybrid": MlxFamily(made={"layer_types": lambda c: ["attention" if k in ("attention", "full_attention") else "mamba" for k in c.layer_types], "position_embedding_type": lambda c: "rope" if c.position_embedding_type == "rope" else "nope", "time_step_limit": lambda c: [float(min(each, 3e38)) for each in c.time_step_limit]}, computed=_SILU, changed=_CHANNELS),
    "granitemoeshared": FAMILIES["granitemoe"],
    "qwen3_next": MlxFamily(keys=("num_experts", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "head_dim", "partial_rotary_factor"),
        made={"full_attention_interval": _interval}, computed={**_SILU, "attention_bias": (False,)}, changed=_CHANNELS, one_added=_ONE_ADDED, refuses=_irregular),
    "mimo_v2_flash": MlxFamily(made={
        "hybrid_layer_pattern": lambda c: [int(k == "sliding_attention") for k in c.layer_types],
        "moe_layer_freq": lambda c: [int(k == "sparse") for k in c.mlp_layer_types],
        "add_swa_attention_sink_bias": lambda c: True, "add_full_attention_sink_bias": lambda c: False,
        "n_shared_experts": lambda c: None, "swa_num_key_value_heads": lambda c: 2 * c.num_key_value_heads, "sliding_window_size": lambda c: c.sliding_window, "topk_method": lambda c: "noaux_tc", "scoring_func": lambda c: "sigmoid",
        "layernorm_epsilon": lambda c: c.rms_norm_eps, "rope_theta": lambda c: c.rope_parameters["full_attention"]["rope_theta"],
        "swa_rope_theta": lambda c: c.rope_parameters["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": lambda c: c.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0),
        }, keys=("attention_value_scale", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"), computed=_SILU, has_tied_head=False),
    "kimi_linear": MlxFamily(renamed={"block_sparse_moe.": "mlp.", "_conv1d.weight": "_conv.conv.weight", "gate.e_score": "e_score"},
        changed={"_conv.conv.weight": lambda conv: conv.movedim(2, 1).contiguous(), "_conv1d.weight": lambda conv: conv.movedim(2, 1).contiguous()}, taken_apart=("kv_b_proj",), computed=_SILU, made={
        "rope_theta": lambda c: 10000.0, "model_max_length": lambda c: c.max_position_embeddings, "head_dim": _head_dim,
        "num_experts": lambda c: c.num_local_experts, "num_experts_per_token": lambda c: c.num_experts_per_tok, "num_shared_experts": lambda c: c.n_shared_experts,
        "moe_renormalize": lambda c: c.norm_topk_prob, "num_expert_group": lambda c: c.n_group, "first_k_dense_replace": _num_dense,
        "linear_attn_config": lambda c: {"head_dim": c.linear_head_dim, "num_heads": c.linear_num_heads, "short_conv_kernel_size": c.linear_conv_kernel_dim,
            "kda_layers": [i + 1 for i, k in enumerate(c.layer_types) if k == "linear_attention"]},
        }),
    "deepseek_v32": replace(_LATENT, made={"first_k_dense_replace": _num_dense}, computed=_SILU),
    "glm_moe_dsa": replace(_LATENT, keys=("rope_parameters",), made={"first_k_dense_replace": _num_dense, "topk_method": lambda c: "noaux_tc", "scoring_func": lambda c: "sigmoid", "moe_layer_freq": lambda c: 1}, computed=_SILU),
    "mistral4": _MISTRAL,
    "mistral3": replace(_MISTRAL, renamed={"model.language_model.": "language_model.model."}, language_model="mistral4"),
    "bailing_hybrid": MlxFamily(taken_apart=("kv_b_proj",), computed=_SILU, changed={"_conv1d.weight": lambda conv: conv.movedim(2, 1).contiguous()},
       made={"architectures": lambda c: ["BailingMoeV3ForCausalLM"], "layer_group_size": _interval, "first_k_dense_replace": _num_dense}),
    "minimax_m3_vl": MlxFamily(renamed=_INSIDE, language_model="minimax_m3_vl_text"),
    "internvl": replace(_QWEN, renamed=_ALONE, language_model="qwen3_moe", written_as="qwen3_moe"),
    "qwen3_omni_moe_thinker": replace(_QWEN, renamed=_ALONE, made={"head_dim": _head_dim}, language_model="qwen3_omni_moe_text", written_as="qwen3_moe"),
    "glm4v_moe": replace(FAMILIES["glm4_moe"], renamed=_ALONE, made={"head_dim": _head_dim}, language_model="glm4v_moe_text", written_as="glm4_moe"),
    "deepseek_ocr2": _OCR, "unlimited_ocr": replace(_OCR, language_model="unlimited_ocr_text"),
}


def check_norms(model: PreTrainedModel, family: MlxFamily, mode: CarrierMode) -> None:
    """Raise ValueError where norms of a file are rounded, and nothing may be.

    Args:
        model: Dense model.
        family: Its.
        mode: "native" allows it.
    """
    if family.one_added and mode == "exact" and model.dtype != torch.float32:
        raise ValueError(
            f"mlx-lm holds norms of {model.config.model_type} with 1 added, which {str(model.dtype)[6:]} rounds (by up "
            "to 1 / 256); choose carrier: native, as mlx-lm's own converter does, or gguf"
        )


def find_family(model: PreTrainedModel) -> MlxFamily:
    """The family of a model.

    Raises:
        ValueError: mlx-lm does not know it, or would compute something else than the model; the setting is named.
    """
    name, config = model.config.model_type, model.config.get_text_config()
    family = FAMILIES.get(name)
    if family is None or family.language_model not in ("", config.model_type):
        of = f" of {config.model_type}" if family else ""
        raise ValueError(
            f"mlx-lm is not known to read {name}{of} rightly; it does {', '.join(FAMILIES)}: choose gguf or "
            "compressed-tensors"
        )
    for key, values in family.computed.items():
        if (value := getattr(config, key, values[0])) not in values:
            raise ValueError(
                f"{key}: {value} of {config.model_type} is not what mlx-lm computes ({values[0]}), and it would not "
                "say so; choose gguf or compressed-tensors"
            )
    if problem := family.refuses(config):
        raise ValueError(f"mlx-lm computes {name} with {problem}; choose gguf or compressed-tensors")
    for kind in _rope_types(config):
        if kind not in family.rope_types:
            raise ValueError(
                f"mlx-lm is not known to compute rotary embeddings of type {kind} for {config.model_type}; choose gguf "
                "or compressed-tensors"
            )
    return family


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary parameters of a configuration whose blocks share them."""
    return dict(getattr(config, "rope_parameters", None) or {})


def _rope_types(config: Any) -> set[str]:
    """Types of the rotary embeddings of all blocks, which may differ by kind of attention."""
    rope = rope_of(config)
    each = [values for values in rope.values() if isinstance(values, dict) and "rope_type" in values] or [rope]
    return {values.get("rope_type", "default") for values in each}
