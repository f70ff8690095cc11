"""A model whose parameters are wider in memory than in its files: float32 numbers that bfloat16 holds exactly.

``widen`` notes the dtype of each tensor before it widens it.  What a run writes into such a model (dequantized
weights, scaled norms, refitted routers) is rounded to that *storage dtype* first, so that what is evaluated is what an
export holds.  Of a model that was not widened, storage dtypes are the parameters' own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Attribute of a widened model: storage dtype by name, and of the whole under "".
_STORED = "_moeq_storage_dtypes"
# Attribute of a module: its own parameters whose dtype is a part of their meaning (scales).
FIXED = "fixed_dtypes"
_SHOWN = 8  # names in an error message


def storage_dtype(model: nn.Module, name: str = "") -> torch.dtype:
    """Dtype that the files have for a parameter or buffer, or for the whole model (of its first float parameter)."""
    stored: dict[str, torch.dtype] = getattr(model, _STORED, {})
    if stored:
        return stored.get(name, stored[""])
    if not name:
        return next(p.dtype for p in model.parameters() if p.is_floating_point())
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor.dtype


def is_widened(model: nn.Module) -> bool:
    """Whether ``widen`` has changed the model."""
    return hasattr(model, _STORED)


def widen(model: nn.Module) -> None:
    """Hold narrower floating-point parameters and buffers in float32, one after another; float32 ones stay.

    Args:
        model: Any model, not widened yet.
    """
    named = dict(_floating(model))
    stored = {name: tensor.dtype for name, tensor in named.items()}
    setattr(model, _STORED, {**stored, "": storage_dtype(model)})
    for tensor in named.values():
        if tensor.dtype.itemsize < torch.float32.itemsize:
            tensor.data = tensor.data.float()  # a tied parameter has several names, and is float32 at the second


def rounded_to_storage(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A new value of a parameter as its file would hold it."""
    return value.to(storage_dtype(model, name))


@contextmanager
def in_storage_dtypes(model: nn.Module) -> Iterator[None]:
    """Within, a widened model has the dtypes of its files; others stay as they are.

    Raises:
        ValueError: Values that the files cannot hold; it names the tensors, and the model stays as it was.
    """
    named = dict(_floating(model)) if is_widened(model) else {}
    # A parameter may have changed in between (an untied head), and has the whole model's dtype then.
    changing = {name: t for name, t in named.items() if t.dtype != storage_dtype(model, name)}
    wide = {name: tensor.dtype for name, tensor in changing.items()}
    lossy = [name for name, t in changing.items() if not _fits(t.data, storage_dtype(model, name))]
    if lossy:
        shown = ", ".join(lossy[:_SHOWN]) + (f" and {len(lossy) - _SHOWN} more" if len(lossy) > _SHOWN else "")
        raise ValueError(
            f"{len(lossy)} tensors hold values that {storage_dtype(model)} of the source's files does not: {shown}; "
            "round what a step writes into the model (moeq.models.storage.rounded_to_storage)"
        )
    try:
        for name, tensor in changing.items():
            tensor.data = tensor.data.to(storage_dtype(model, name))
        yield
    finally:
        for name, tensor in changing.items():
            tensor.data = tensor.data.to(wide[name])


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers by name, tied ones by each name, without those of a fixed dtype."""
    for path, module in model.named_modules():
        fixed = getattr(module, FIXED, ())
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and leaf not in fixed:
                yield (f"{path}.{leaf}" if path else leaf), tensor
