"""A model whose parameters are wider in memory than in its files: float32 numbers that bfloat16 holds exactly.

``widen`` notes the dtype of each tensor before it widens it.  What a run writes into such a model (dequantized
weights, scaled norms, refitted routers) is rounded to that *storage dtype* first, so that what is evaluated is what an
export holds.  Of a model that was not widened, storage dtypes are the parameters' own.

Files may hold some tensors in another dtype than the model does: routers in float32 beside a model in bfloat16, or in
bfloat16 what a family computes in float32.  ``note_files`` says which.  Exports have the dtype of the files, and as
long as nothing changes such a tensor, its values there, to the bit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Attribute of a widened model: storage dtype by name, and of the whole under "".
_STORED = "_moeq_storage_dtypes"
# Attribute of a model: what its source's files hold in another dtype, by name.
_FILES = "_moeq_file_tensors"
# Attribute of a module: its own parameters whose dtype is a part of their meaning (scales).
FIXED = "fixed_dtypes"


def storage_dtype(model: nn.Module, name: str = "") -> torch.dtype:
    """Dtype to which values of a parameter or buffer are rounded, or of the whole model (its first float parameter's).

    It is the narrower one of the files and of the model before it was widened.
    """
    held = _held_dtype(model, name)
    noted = _noted(model, name)
    return held if noted is None or noted.dtype.itemsize > held.itemsize else noted.dtype


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the model as its source's files hold it: the dtype, and a function that reads the values."""

    dtype: torch.dtype
    read: Callable[[], Tensor]


def note_files(model: nn.Module, tensors: Mapping[str, FileTensor]) -> None:
    """Note which tensors of a model its files hold in another dtype, by name."""
    setattr(model, _FILES, dict(tensors))


def file_dtype(model: nn.Module, name: str) -> torch.dtype:
    """Dtype that the source's files have for a floating-point tensor, and exports have, too."""
    noted = _noted(model, name)
    return storage_dtype(model, name) if noted is None else noted.dtype


def unchanged_in_files(model: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """Values that files hold in another dtype than the model, as they are there; None for others, or changed ones."""
    noted = _noted(model, name)
    if noted is None:
        return None
    value = noted.read()
    rounded = value.to(storage_dtype(model, name)).to(tensor.device, tensor.dtype)
    return value if value.shape == tensor.shape and torch.equal(rounded, tensor) else None


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


def _noted(model: nn.Module, name: str) -> FileTensor | None:
    noted: dict[str, FileTensor] = getattr(model, _FILES, {})
    return noted.get(name)


def _held_dtype(model: nn.Module, name: str) -> torch.dtype:
    """Dtype of a parameter or buffer before the model was widened."""
    stored: dict[str, torch.dtype] = getattr(model, _STORED, {})
    if stored:
        return stored.get(name, stored[""])
    if not name:
        return next(p.dtype for p in model.parameters() if p.is_floating_point())
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor.dtype


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and buffers by name, tied ones by each name, without those of a fixed dtype."""
    for path, module in model.named_modules():
        fixed = getattr(module, FIXED, ())
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and leaf not in fixed:
                yield (f"{path}.{leaf}" if path else leaf), tensor
