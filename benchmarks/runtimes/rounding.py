"""llama.cpp's rounding of activations, done in transformers: what its arithmetic alone does to a prediction.

A product with a quantized weight takes activations as 8-bit integers, 32 of them with one scale in float16; a product
with a weight in bfloat16 or float16 takes them in that dtype.

Source: ggml-cpu of llama.cpp (``vec_dot_type`` of each type, ``quantize_row_q8_0``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_weight
from moeq.formats.gguf_plan import Planned, plan_file
from moeq.formats.source import PackedExport
from moeq.models.experts import expert_modules
from moeq.quant.carrier import CarrierMode

_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 32


def rounded_activations(values: Tensor, kind: str) -> Tensor:
    """Activations [..., I] as a product with a weight of a type takes them."""
    if kind == "F32" or values.shape[-1] % _BLOCK:
        return values
    if kind in _DTYPES:
        return values.to(_DTYPES[kind]).to(values.dtype)
    blocks = values.unflatten(-1, (-1, _BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((blocks * inverse).round() * scale.half().to(values.dtype)).flatten(-2)


class RoundedActivations(TorchFunctionMode):
    """While it is entered, products round their activations by the type of the weight.

    Args:
        kinds: Types by the address of the storage of a weight; others are not touched.
    """

    def __init__(self, kinds: Mapping[int, str]) -> None:
        super().__init__()
        self._kinds = kinds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            kind = self._kinds.get(args[1].untyped_storage().data_ptr())
            if kind is not None:
                args = (rounded_activations(args[0], kind), *args[1:])
        return func(*args, **(kwargs or {}))


def rounding_of(model: PreTrainedModel, export: PackedExport, carrier: CarrierMode) -> RoundedActivations:
    """The rounding that the GGUF file of an export makes in llama.cpp.

    Args:
        model: With values.
        export: What the file is made of.
        carrier: Which types may hold a grid.
    """
    return RoundedActivations(dict(_storages(model, plan_file(export.model, export.grids, carrier))))


def _storages(model: PreTrainedModel, plan: Iterable[Planned]) -> Iterable[tuple[int, str]]:
    experts, state = expert_modules(model), dict(model.named_parameters())
    for planned in plan:
        for name in planned.weights:
            yield dense_weight(model, name, experts).untyped_storage().data_ptr(), planned.stored.kind
        if planned.tensor in state and state[planned.tensor].ndim > 1:
            yield state[planned.tensor].untyped_storage().data_ptr(), planned.stored.kind
