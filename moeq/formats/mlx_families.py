"""What mlx-lm's classes of mixtures expect of files and read of configurations, where it differs between families.

A family is here once its tiny random model, opened by mlx-lm, has given the logits of transformers.  A setting that
its class does not read is held to the value that the class computes with.  Left out, as read wrongly or rounded on the
way (mlx-lm 0.32): ernie4_5_moe and jamba (other logits than transformers), qwen3_next and qwen3_5_moe (one is added to
norms in the dtype of the files), gpt_oss (expects MXFP4).

Source: mlx_lm/models/*.py of mlx-lm 0.32.2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel


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


_SILU = {"hidden_act": ("silu",)}
_ALL_FULL = {"sliding_window": (None,)}
_LATENT = MlxFamily(
    computed={**_SILU, "rope_interleave": (True,)}, has_tied_head=False, taken_apart=("kv_b_proj",)
)  # fmt: skip


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
    "laguna": MlxFamily(computed=_SILU),
    "mellum": MlxFamily(keys=("num_experts",), computed=_SILU),
    "nemotron_h": MlxFamily(leaves={"up_proj": "fc1", "down_proj": "fc2"}, computed={"mlp_hidden_act": ("relu2",)}),
}  # fmt: skip


def find_family(model: PreTrainedModel) -> MlxFamily:
    """The family of a model.

    Raises:
        ValueError: mlx-lm does not know it, or would compute something else than the model; the setting is named.
    """
    config = model.config
    if (family := FAMILIES.get(config.model_type)) is None:
        raise ValueError(
            f"mlx-lm is not known to read {config.model_type} rightly; it does {', '.join(FAMILIES)}: choose gguf or "
            "compressed-tensors"
        )
    for key, values in family.computed.items():
        if (value := getattr(config, key, values[0])) not in values:
            raise ValueError(
                f"{key}: {value} of {config.model_type} is not what mlx-lm computes ({values[0]}), and it would not "
                "say so; choose gguf or compressed-tensors"
            )
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


def completed(values: Mapping[str, Any], config: Any, family: MlxFamily) -> dict[str, Any]:
    """A source's configuration with what mlx-lm's class reads and other libraries look for elsewhere.

    Args:
        values: Of ``config.json``.
        config: The same as transformers reads it.
        family: Of the model.
    """
    rope = rope_of(config)
    added: dict[str, Any] = {"tie_word_embeddings": bool(config.tie_word_embeddings)}
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    if "rope_theta" in rope:
        added["rope_theta"] = rope["rope_theta"]
    for key in family.keys:
        added[key] = rope[key] if key in rope else getattr(config, key, None)
    added |= {key: make(config) for key, make in family.made.items()}
    return {**values, **{key: value for key, value in added.items() if key not in values}}
