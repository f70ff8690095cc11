"""Linears that are kept in full precision: routers and gates, and others that no table of inputs covers.

Routers of transformers v5 are mostly their own classes with a bare ``weight``; the ones below are ``nn.Linear`` or
subclasses of it, and would be quantized by mistake by anything that targets linears.  A linear is quantized only where
``moeq.models.families`` says which input it reads; every other one is kept, with a reason.
"""

from torch import nn

from moeq.models.families import linear_stage

# Parts of a path inside of which everything scores or gates experts.
ROUTERS = frozenset({"gate", "router", "classifier", "wg", "shared_expert_gate"})

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
