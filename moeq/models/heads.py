"""Value and output projections of attention heads, between which a rotation of each head's values cancels.

With p the attention probabilities, a head's output is ``sum_t p_t W_v x_t``, and the head enters the block through
its columns of W_o; so for any orthogonal R, ``W_v <- R^T W_v`` and ``W_o <- W_o R`` cancel.  Whether a family does
nothing else in between (a gate, a norm) is for the caller to measure.
"""

from dataclasses import dataclass

from torch import nn

from moeq.models.adapter import Adapter, own_parameter
from moeq.models.axis_maps import Steps
from moeq.models.families import VALUE_LEAVES
from moeq.quant.hadamard import Basis


@dataclass(frozen=True)
class ValueHeads:
    """Values of one attention.

    Attributes:
        value: Path of the projection that makes them.
        output: Path of the projection that reads the averages.
        num_heads: Heads of the value projection (fewer than those of the output projection, where they are shared).
        size: Values of a head: the last ones of the rows that the value projection has for it.
    """

    value: str
    output: str
    num_heads: int
    size: int


def find_value_heads(adapter: Adapter, block: int) -> ValueHeads | str | None:
    """Where a block has its values; the reason where they cannot be told; None for a block without attention."""
    outputs = [site.modules[0] for site in adapter.sites(block) if site.stage == "attention_out"]
    if not outputs:
        return None
    output, model = outputs[0], adapter.model
    parent = output.rpartition(".")[0]
    attention = model.get_submodule(parent)
    leaf = next((leaf for leaf in VALUE_LEAVES if isinstance(getattr(attention, leaf, None), nn.Linear)), None)
    if leaf is None or len(outputs) > 1:
        return "its attention has no value projection of its own"
    rows = len(model.get_parameter(f"{parent}.{leaf}.weight"))
    columns = model.get_parameter(f"{output}.weight").shape[1]
    sizes = (getattr(attention, name, None) for name in ("v_head_dim", "head_dim"))
    size = next((size for size in sizes if isinstance(size, int)), 0)
    # A latent attention makes keys and values of every head in one projection.
    num_heads = 0 if not size else (columns if VALUE_LEAVES[leaf] else rows) // size
    if not num_heads or columns % size or rows % num_heads or rows // num_heads < size:
        return "the size of its heads is not known"
    return ValueHeads(f"{parent}.{leaf}", output, num_heads, size)


def turn_values(model: nn.Module, heads: ValueHeads, basis: Basis, steps: Steps) -> None:
    """Rotate the values of every head, and turn them back where they are read."""
    columns = model.get_parameter(f"{heads.output}.weight").shape[1]
    steps.turn_heads(f"{heads.value}.weight", -2, heads.num_heads, heads.size, basis)
    if own_parameter(model.get_submodule(heads.value), "bias") is not None:
        steps.turn_heads(f"{heads.value}.bias", -1, heads.num_heads, heads.size, basis)
    steps.turn_heads(f"{heads.output}.weight", -1, columns // heads.size, heads.size, basis)
