"""Tensors of a finished model as its files hold them: names without duplicates, in the dtypes of the source's files."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moeq.disk.tensor_file import Declared
from moeq.export.finished import FinishedModel
from moeq.models import storage


def declared_tensors(model: PreTrainedModel) -> dict[str, Declared]:
    """Every tensor that ``save_pretrained`` would write, by name in the model: tied ones once; no values are needed."""
    kept = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return {name: Declared(file_dtype(model, name, tensor), tuple(tensor.shape)) for name, tensor in kept.items()}


def file_dtype(model: PreTrainedModel, name: str, tensor: Tensor) -> torch.dtype:
    """Dtype that files have for a tensor of the model."""
    return storage.file_dtype(model, name) if tensor.is_floating_point() else tensor.dtype


def outside_tensors(source: FinishedModel) -> Iterator[tuple[str, Tensor]]:
    """What belongs to no block, by name, as files hold it.

    Raises:
        ValueError: See ``as_stored``.
    """
    model, blocks = source.model, f"{source.adapter.block_prefix}."
    for name, tensor in remove_tied_weights_from_state_dict(model.state_dict(), model).items():
        if not name.startswith(blocks):
            yield name, as_stored(model, name, tensor)


def block_tensors(source: FinishedModel, block: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a block that is finished, by name, as the model holds them."""
    yield from source.adapter.blocks[block].state_dict(prefix=f"{source.path(block)}.").items()


def as_stored(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor of the model, or of a part of it, in the dtype of the source's files.

    Raises:
        ValueError: That dtype does not hold them.
    """
    if (unchanged := storage.unchanged_in_files(model, name, tensor)) is not None:
        return unchanged
    dtype = file_dtype(model, name, tensor)
    value = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(value.to(tensor.dtype), tensor):
        raise ValueError(
            f"{name} holds values that {dtype} of the source's files does not; round what a step writes into the model "
            "(moeq.models.storage.rounded_to_storage)"
        )
    return value
