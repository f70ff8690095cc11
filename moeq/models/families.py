"""What differs from family to family, as tables of names: routers and gates, and the stage of each linear.

Routers of transformers v5 are mostly their own classes with a bare ``weight``; the ones below are ``nn.Linear`` or
subclasses of it, and would be quantized by mistake by anything that targets linears.
"""

from torch import nn

ROUTER_LEAVES = frozenset({"gate", "router", "classifier", "wg", "shared_expert_gate"})
SHARED_GATE = "shared_expert_gate"

# Where in the data flow of a block the input of a linear arises.  Anything else in an attention module reads the
# normalised input of the block ("attention_in").
ATTENTION_MID = frozenset({"q_b_proj", "kv_b_proj"})
ATTENTION_OUT = frozenset({"o_proj", "out_proj", "dense"})
MLP_IN = frozenset({"gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "fc1", "input_linear"})
MLP_DOWN = frozenset({"down_proj", "w2", "fc2", "output_linear"})

# Projections whose output attention averages: values alone, or (True) keys and values of every head, values last.
VALUE_LEAVES = {"v_proj": False, "kv_b_proj": True}


def is_router(path: str, linear: nn.Linear) -> bool:
    """True for a linear that scores or gates experts: it is never quantized."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ROUTER_LEAVES or parent.rpartition(".")[2] in ROUTER_LEAVES or linear.out_features == 1


def linear_stage(leaf: str) -> str:
    """Stage (see ``adapter.STAGES``) of a linear by the last part of its path."""
    if leaf in MLP_IN:
        return "mlp_in"
    if leaf in MLP_DOWN:
        return "mlp_down"
    if leaf in ATTENTION_MID:
        return "attention_mid"
    return "attention_out" if leaf in ATTENTION_OUT else "attention_in"


def shared_gate(sparse_block: nn.Module) -> nn.Module | None:
    """The one-row linear whose sigmoid multiplies the shared expert's output, where the family has one."""
    gate = getattr(sparse_block, SHARED_GATE, None)
    return gate if isinstance(gate, nn.Module) else None
