"""Weights of a module of routed experts as [O, I] or [E, O, I], whatever its layout in transformers.

    z = W_in x + b_in,    inner = activate(z),    y = W_down inner + b_down,    W_in = gate above up, or up alone

Families differ in how they store this: transposed (``x @ W``), gate and up rows in turn instead of one above the
other, with biases, without a gate.  The decorator of the experts interface tells which (``is_transposed``,
``is_concatenated``, ``has_bias``, ``has_gate``); everything outside of this file sees one layout.

Legend: E experts, O out, I in, N tokens, F expert width; "into" is W_in.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ExpertSide = Literal["into", "down"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def is_experts_module(module: nn.Module) -> bool:
    """True for a module that follows the experts interface of transformers v5 (routed experts as one module)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every experts module by path, in block order."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def num_experts(module: nn.Module) -> int:
    """E of an experts module."""
    return int(module.num_experts)  # type: ignore[arg-type]


def projections(module: nn.Module) -> tuple[str, ...]:
    """Projections of each expert in the order in which they are applied; gate and up read the same input."""
    return PROJECTIONS if module.has_gate else PROJECTIONS[1:]


def parameter_name(module: nn.Module, part: ExpertSide) -> str:
    """Name of the parameter that holds a part of all experts."""
    if part == "down":
        return "down_proj"
    return "gate_up_proj" if module.has_gate else "up_proj"


def layout_problem(module: nn.Module) -> str | None:
    """Why the experts of a module cannot be taken apart; None where they can."""
    if not isinstance(getattr(module, "down_proj", None), Tensor):
        return "has packed weights: it is a quantized export already"
    if getattr(module, "has_post_expert_norm", False):
        return "has a norm after each expert"
    return None


def canonical(module: nn.Module, part: ExpertSide, stored: Tensor) -> Tensor:
    """[..., O, I] of a weight in the family's own layout; a view where the rows are in order already."""
    weight = stored.mT if module.is_transposed else stored
    if part == "into" and _in_turn(module):
        return torch.cat([weight[..., 0::2, :], weight[..., 1::2, :]], -2)
    return weight


def as_stored(module: nn.Module, part: ExpertSide, weight: Tensor) -> Tensor:
    """A weight [..., O, I] in the family's own layout, contiguous: the inverse of ``canonical``."""
    if part == "into" and _in_turn(module):
        weight = torch.stack(weight.chunk(2, -2), -2).flatten(-3, -2)
    return (weight.mT if module.is_transposed else weight).contiguous()


def stacked_shape(module: nn.Module, part: ExpertSide) -> tuple[int, int, int]:
    """(E, O, I) of ``stacked_weight``, from the shape of the parameter alone."""
    experts, rows, columns = _parameter(module, part).shape
    return (experts, columns, rows) if module.is_transposed else (experts, rows, columns)


def stacked_weight(module: nn.Module, part: ExpertSide, experts: Sequence[int] | None = None) -> Tensor:
    """Weights of all experts, [E, O, I] (a view or a copy), or of some by index, in this order (a copy)."""
    stored = _parameter(module, part)
    return canonical(module, part, stored if experts is None else stored[list(experts)])


@torch.no_grad()
def write_stacked(
    module: nn.Module, part: ExpertSide, weight_EOI: Tensor, experts: Sequence[int] | None = None
) -> None:
    """Write the weights of all experts, or of some by index."""
    if experts is None:
        _parameter(module, part).copy_(as_stored(module, part, weight_EOI))
        return
    for expert, weight_OI in zip(experts, weight_EOI, strict=True):
        _parameter(module, part)[expert].copy_(as_stored(module, part, weight_OI))


def expert_weight(module: nn.Module, expert: int, leaf: str) -> Tensor:
    """One projection of one expert, [O, I] (a view)."""
    part: ExpertSide = "down" if leaf == "down_proj" else "into"
    stored = _parameter(module, part)[expert]
    weight = stored.mT if module.is_transposed else stored
    if part == "down" or not module.has_gate:
        return weight
    first = leaf == "gate_proj"
    if _in_turn(module):
        return weight[0 if first else 1 :: 2]
    return weight.chunk(2)[0 if first else 1]


def projections_of(module: nn.Module, name: str, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every projection of every expert in a parameter of an experts module, as ("3.gate_proj.weight", [O, I]).

    Args:
        module: Its values do not matter.
        name: Of the parameter in the module: weights, or their biases ("3.gate_proj.bias", [O]).
        stored: Its value.
    """
    part: ExpertSide = "down" if name.startswith("down_proj") else "into"
    leaves = ("down_proj",) if part == "down" else projections(module)[:-1]
    kind = "bias" if name.endswith("_bias") else "weight"
    for expert, value in enumerate(stored):
        if kind == "weight":
            rows = canonical(module, part, value)
        else:
            rows = torch.cat([value[0::2], value[1::2]]) if part == "into" and _in_turn(module) else value
        for leaf, piece in zip(leaves, rows.chunk(len(leaves)), strict=True):
            yield f"{expert}.{leaf}.{kind}", piece


def project_in(module: nn.Module, expert: int, x_NI: Tensor, weight_OI: Tensor | None = None) -> Tensor:
    """The z of one expert, [N, O], gate before up; with another weight than the module's where one is given."""
    if weight_OI is None:
        weight_OI = canonical(module, "into", _parameter(module, "into")[expert])
    return F.linear(x_NI, weight_OI, _bias(module, "into", expert))


def activate(module: Any, z_NO: Tensor) -> Tensor:
    """Input of the down projection, [N, F], by the family's own gate function."""
    if not module.has_gate:
        inner: Tensor = module.act_fn(z_NO)
        return inner
    if _in_turn(module):
        z_NO = torch.stack(z_NO.chunk(2, -1), -1).flatten(-2)
    # The hook by which families replace the gate function; transformers 5.23 has no public one.
    gated: Tensor = module._apply_gate(z_NO)
    return gated


def project_down(module: nn.Module, expert: int, inner_NF: Tensor, weight_OI: Tensor | None = None) -> Tensor:
    """Output of one expert before its affinity, [N, O]."""
    if weight_OI is None:
        weight_OI = canonical(module, "down", _parameter(module, "down")[expert])
    return F.linear(inner_NF, weight_OI, _bias(module, "down", expert))


def stacked_bias(module: nn.Module, part: ExpertSide) -> Tensor | None:
    """Biases of all experts, [E, O], in the order of the rows of ``stacked_weight``; None where there are none."""
    if not getattr(module, "has_bias", False):
        return None
    bias_EO: Tensor = getattr(module, f"{parameter_name(module, part)}_bias")
    if part == "into" and _in_turn(module):
        return torch.cat([bias_EO[:, 0::2], bias_EO[:, 1::2]], 1)
    return bias_EO


def _parameter(module: nn.Module, part: ExpertSide) -> Tensor:
    parameter = getattr(module, parameter_name(module, part))
    assert isinstance(parameter, Tensor)
    return parameter


def _bias(module: nn.Module, part: ExpertSide, expert: int) -> Tensor | None:
    bias_EO = stacked_bias(module, part)
    return None if bias_EO is None else bias_EO[expert]


def _in_turn(module: nn.Module) -> bool:
    """Gate and up rows alternate."""
    return bool(module.has_gate) and not getattr(module, "is_concatenated", True)
