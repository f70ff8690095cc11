"""Tables of names by model family: routers and gates, the stage of each linear, what is kept in full precision.

Routers of transformers v5 are mostly their own classes with a bare ``weight``; the ones below are ``nn.Linear`` or
subclasses of it, and would be quantized by mistake by anything that targets linears.  A linear is quantized only where
these tables say which input it reads; every other one is kept, with a reason.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

# Where in the data flow of a block the input of a linear arises.
STAGES = ("attention_in", "attention_mid", "attention_out", "mlp_pre", "mlp_in", "mlp_down", "mlp_post")

# Parts of a path inside of which everything scores or gates experts.
ROUTERS = frozenset({"gate", "router", "classifier", "wg", "shared_expert_gate"})
SHARED_GATE = "shared_expert_gate"
SHARED = frozenset({"shared_expert", "shared_experts", "shared_mlp"})

# Parts of a path inside of which tokens are mixed; a "mixer" may also be a feed-forward block.
TOKEN_MIXERS = frozenset({"self_attn", "linear_attn", "attention", "mamba", "conv"})
ANY_MIXER = "mixer"
# Anything else in a token mixer reads the normalised input of the block ("attention_in").
ATTENTION_MID = frozenset({"q_b_proj", "kv_b_proj", "g_b_proj", "q_gate_proj"})
ATTENTION_OUT = frozenset({"o_proj", "o_b_proj", "out_proj", "dense"})
MLP_PRE = frozenset({"fc1_latent_proj"})
MLP_IN = frozenset({"gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "fc1", "input_linear"})
MLP_DOWN = frozenset({"down_proj", "w2", "fc2", "output_linear"})
MLP_POST = frozenset({"fc2_latent_proj"})

# Small linears that stay in full precision wherever their name is part of a path.
_HEADS = "one number per head that steers a recurrence: few rows, and an error stays in the state"
_STEP = "step and matrices of the recurrence: small, and an error stays in the state"
_STREAMS = "mixes the residual streams, as a norm: small"
_LAYER_INPUT = "lets an embedding of its own into each block: small"
_NORM = "part of a norm"
KEPT = {
    "indexer": "chooses the tokens that attention reads, as a router chooses experts",
    "in_proj_ba": _HEADS, "in_proj_a": _HEADS, "in_proj_b": _HEADS, "b_proj": _HEADS, "sink_proj": _HEADS,
    "forget_gate": _STEP, "x_proj": _STEP, "dt_proj": _STEP,
    "per_layer_input_gate": _LAYER_INPUT, "per_layer_projection": _LAYER_INPUT,
    "attn_hyper_connection": _STREAMS, "mlp_hyper_connection": _STREAMS,
    "v_proj_delayed": "also called with the state before the first token, which is no token of the data",
    "input_layernorm": _NORM, "post_attention_layernorm": _NORM,
}  # fmt: skip

# Decoder blocks that return (hidden states, something that the next block is called with).
HAND_ON = frozenset({"ZayaDecoderLayer", "GlmMoeDsaDecoderLayer", "HYV4DecoderLayer"})

# Families whose blocks pass on several residual streams: hidden states [B, T, S, D] or [B, T, S * D].
SEVERAL_STREAMS = frozenset({"deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text"})

# Projections whose output attention averages: values alone, or (True) keys and values of every head, values last.
VALUE_LEAVES = {"v_proj": False, "kv_b_proj": True}


def is_router(path: str, linear: nn.Linear) -> bool:
    """True for a linear that scores or gates experts: it is never quantized."""
    return is_router_part(path) or linear.out_features == 1


def is_router_part(path: str) -> bool:
    """True for anything inside a router or gate."""
    return not ROUTERS.isdisjoint(path.split("."))


def kept_reason(path: str, linear: nn.Linear) -> str | None:
    """Why a linear that is no router stays in full precision; None for one that is quantized."""
    for part in path.split("."):
        if part in KEPT:
            return KEPT[part]
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} computes something else than a matrix product of its whole input"
    if linear_stage(path) is None:
        return "no table says which input it reads"
    return None


def linear_stage(path: str) -> str | None:
    """Stage (one of ``STAGES``) of a linear; None where the tables do not know."""
    parts = path.split(".")
    leaf = parts[-1]
    mixes = not TOKEN_MIXERS.isdisjoint(parts)
    if not mixes:
        for stage, leaves in (
            ("mlp_pre", MLP_PRE), ("mlp_in", MLP_IN), ("mlp_down", MLP_DOWN), ("mlp_post", MLP_POST)
        ):  # fmt: skip
            if leaf in leaves:
                return stage
    if not mixes and ANY_MIXER not in parts:
        return None
    if leaf in ATTENTION_MID:
        return "attention_mid"
    return "attention_out" if leaf in ATTENTION_OUT else "attention_in"


def shared_gate(sparse_block: nn.Module) -> nn.Module | None:
    """The one-row linear whose sigmoid multiplies the shared expert's output, where the family has one."""
    gate = getattr(sparse_block, SHARED_GATE, None)
    return gate if isinstance(gate, nn.Module) else None


def survey_refusal(config: Any, stages: Collection[str], *, of_output: bool) -> str | None:
    """Why a survey cannot be made of a model; None where it can.

    Args:
        config: Of the model.
        stages: Stages of its sites.
        of_output: The survey measures changes of a block's output, one expert alone.
    """
    if getattr(config, "model_type", None) in SEVERAL_STREAMS:
        return "its blocks pass on several residual streams"
    if of_output and "mlp_post" in stages:
        return "a projection stands between its experts and the output of the block; choose fisher or hessian"
    return None


def refusal(config: Any) -> str | None:
    """Why a family, though its experts follow the interface, cannot be run block by block; None where it can."""
    if getattr(config, "model_type", None) == "inkling2_text":
        return "its blocks read the outputs of all earlier ones, which are not kept"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its last blocks read the keys and values of earlier ones, which are not kept"
    return None
