"""Weight files that torch pickled (``pytorch_model.bin``), tensor by tensor: mapped, and copied when they are read."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class PickledTensor:
    """One tensor of a file, mapped into memory and not read yet."""

    path: Path
    name: str
    mapped: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return self.mapped.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.mapped.shape)

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.mapped.nbytes

    @property
    def parts(self) -> "tuple[PickledTensor]":
        """What lies in files of it: itself."""
        return (self,)

    def read(self) -> Tensor:
        """Its values, in memory of its own."""
        return self.mapped.detach().clone(memory_format=torch.contiguous_format)


def pickled_tensors(path: Path) -> dict[str, PickledTensor]:
    """Tensors of a file by name.  Nothing but tensors is unpickled: no code of the file runs.

    Raises:
        ValueError: The file is missing, truncated or damaged, or holds anything else than tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages that torch still reads
            content = torch.load(path, map_location="cpu", mmap=_is_archive(path), weights_only=True)
    except Exception as error:  # the classes that torch and pickle raise here are many
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is missing, truncated or damaged ({reason}); export or copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds more than tensors by name; save the state dict of the model alone")
    return {name: PickledTensor(path, name, value) for name, value in content.items()}


def _is_archive(path: Path) -> bool:
    """Whether a file is one that can be mapped; those of torch before 1.6 are read whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
