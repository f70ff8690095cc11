"""Which tensors the files of an export hold, in which file, and how those of a model become them.

All of it follows from a *skeleton*, a model on the meta device: names are reverted to those the family was published
with by transformers' own conversions, files are split as ``save_pretrained`` splits them.  Tensors that are only
renamed are written as they come; those that are taken apart or put together (fused experts) are so block by block.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moeq.checkpoint.affine import Readable
from moeq.disk.atomic import write_text
from moeq.disk.folder import INDEX
from moeq.disk.tensor_file import Declared, TensorFileWriter, tensor_file_writer

MAX_SHARD = "5GB"
_METADATA = {"format": "pt"}  # from_pretrained asks for it


@dataclass(frozen=True)
class Layout:
    """Of the weight files of one folder.

    Attributes:
        skeleton: Model on the meta device whose names and conversions the files follow.
        declared: Every tensor of the files by key, in the order of the files.
        renamed: Keys of the tensors that files hold as the model does, by name in the model.
        files: Keys of each file by its name.
    """

    skeleton: PreTrainedModel
    declared: dict[str, Declared]
    renamed: dict[str, str]
    files: dict[str, list[str]]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(declared.num_bytes for declared in self.declared.values())


def plan_layout(
    skeleton: PreTrainedModel, tensors: Mapping[str, Declared], carried: Mapping[str, Readable] | None = None
) -> Layout:
    """Plan the files of a model.

    Args:
        skeleton: On the meta device, with the conversions that its files need (``_weight_conversions``).
        tensors: What is written, by name in the skeleton.
        carried: What is copied from other files, by key.

    Raises:
        ValueError: A key that is carried is one of the model's.
    """
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    reverted = revert_weight_conversion(skeleton, dict(empty))
    key_of = {id(tensor): key for key, tensor in reverted.items()}
    declared = {key: Declared(tensor.dtype, tuple(tensor.shape)) for key, tensor in reverted.items()}
    for key, tensor in (carried or {}).items():
        if key in declared:
            raise ValueError(f"{key} is in the source's files and in the model, which did not take it from there")
        declared[key] = Declared(tensor.dtype, tensor.shape)
    renamed = {name: key_of[id(tensor)] for name, tensor in empty.items() if id(tensor) in key_of}
    return Layout(skeleton, declared, renamed, _shards(declared))


def plan_keys(skeleton: PreTrainedModel, declared: Mapping[str, Declared]) -> Layout:
    """Plan files of tensors that are given by their keys, in the order of the files.

    Args:
        skeleton: The model, which the index counts the parameters of.
        declared: What is written, by key.
    """
    return Layout(skeleton, dict(declared), {key: key for key in declared}, _shards(declared))


class LayoutWriter:
    """Writes tensors of a model to where they belong; made by ``layout_writer``."""

    def __init__(self, layout: Layout, writers: Mapping[str, TensorFileWriter]) -> None:
        self._layout = layout
        self._writer_of = {key: writers[file] for file, keys in layout.files.items() for key in keys}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write some tensors of the model by name: those that become one tensor of the files come in one call.

        Each is written and dropped before the next is asked for, but for those that are not only renamed.

        Raises:
            ValueError: A tensor does not belong to the layout, or was written before.
        """
        converted = {}
        for name, tensor in tensors:
            if name in self._layout.renamed:
                self._write(self._layout.renamed[name], tensor)
            else:
                converted[name] = tensor
        for key, tensor in revert_weight_conversion(self._layout.skeleton, converted).items():
            self._write(key, tensor)

    def copy(self, tensors: Iterable[Readable]) -> None:
        """Copy tensors of other files by their keys, one after another; see ``write``."""
        for tensor in tensors:
            self._write(tensor.name, tensor.read())

    def _write(self, key: str, tensor: Tensor) -> None:
        if key not in self._writer_of:
            raise ValueError(f"{key} is no tensor of the planned files; the conversions of the family span its blocks")
        self._writer_of[key].write(key, tensor)


@contextmanager
def layout_writer(folder: Path, layout: Layout) -> Iterator[LayoutWriter]:
    """Write the weight files of a folder, and their index where there are several.

    Raises:
        ValueError: A tensor of the layout was not written, or the disk does not take a file.
    """
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(
                tensor_file_writer(folder / file, {key: layout.declared[key] for key in keys}, _METADATA)
            )
            for file, keys in layout.files.items()
        }
        yield LayoutWriter(layout, writers)
    if len(layout.files) > 1:
        index = {
            "metadata": {"total_parameters": layout.skeleton.num_parameters(), "total_size": layout.num_bytes},
            "weight_map": {key: file for file, keys in layout.files.items() for key in keys},
        }
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(declared: Mapping[str, Declared]) -> dict[str, list[str]]:
    """Keys of each file by its name, split as ``save_pretrained`` splits them."""
    split = split_state_dict_into_shards_factory(
        dict(declared),
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    files: dict[str, list[str]] = split.filename_to_tensors
    return files
