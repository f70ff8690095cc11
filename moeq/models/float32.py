"""Which tensors a model takes in float32 while it computes in a narrower dtype.

A correction bias that chooses experts, or a decay, has values that bfloat16 does not tell apart; families read many of
them in float32 whatever the dtype of the model.  Others would raise, or make everything after them float32.
"""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from moeq.models.not_quantized import is_router_part

# Added to, or made a factor of, what families have computed in float32.
BIASES = frozenset({"e_score_correction_bias", "expert_bias", "A_log", "dt_bias"})


def computed_in_float32(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Of some parameters and buffers, those that their own module takes in float32 in a model of another dtype.

    Routers are asked: one that takes its weight in float32 beside inputs of the model's dtype runs, others raise.
    """
    found = set()
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in BIASES or (leaf == "weight" and is_router_part(name) and _runs_in_float32(owner)):
            found.add(name)
    return found


@torch.no_grad()
def _runs_in_float32(router: nn.Module) -> bool:
    weight = router._parameters.get("weight")
    if weight is None or weight.ndim != 2 or weight.dtype == torch.float32:
        return False
    hidden = torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype)
    others = list(inspect.signature(router.forward).parameters.values())[1:]
    needed = [each for each in others if each.default is inspect.Parameter.empty]
    if not all("bias" in each.name for each in needed):
        return False
    biases = tuple(torch.zeros(weight.shape[0]) for _ in needed)
    held = (*router.named_parameters(), *router.named_buffers())
    values = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in held}
    values["weight"] = values["weight"].float()
    try:
        torch.func.functional_call(router, values, (hidden, *biases))  # the meta device would not mind two dtypes
    except Exception:  # whatever the code of a family raises for operands of two dtypes
        return False
    return True
