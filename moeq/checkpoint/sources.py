"""Which tensors of a folder's files the parameters of a model are made of, by transformers' own conversions."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictInfo

from moeq.disk.folder import weight_files
from moeq.disk.tensor_file import StoredTensor, stored_tensors
from moeq.models.storage import storage_dtype


@dataclass(frozen=True)
class Source:
    """Where one parameter of the model comes from: its files' tensors with the pattern that each matched."""

    converter: WeightConverter | None
    tensors: tuple[tuple[StoredTensor, str | None], ...]


def stored_in(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key."""
    paths = weight_files(folder)
    if missing := [path for path in paths if not path.is_file()]:
        other = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf"))
        remedy = f"it holds {other}; convert them to safetensors" if other else "download or copy the folder again"
        raise ValueError(f"{missing[0]} is missing, so blocks cannot be streamed; {remedy}")
    return {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}


def find_sources(model: PreTrainedModel, stored: Mapping[str, StoredTensor], mapping: list[Any]) -> dict[str, Source]:
    """Which tensors of the files each parameter is made of, by transformers' conversions; unknown ones are left out."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[StoredTensor, str | None]]] = defaultdict(list)
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name in known:
            found[name].append((stored[key], pattern))
    # What save_pretrained reverts: the conversions that these files needed.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return {
        name: Source(by_pattern[tensors[0][1]] if tensors[0][1] else None, tuple(tensors))
        for name, tensors in found.items()
    }


def made_of(
    model: PreTrainedModel, name: str, source: Source, info: LoadStateDictInfo
) -> dict[str, Tensor | list[Tensor]]:
    """Parameters that are made of a source, by name."""
    if source.converter is None:
        # Of several keys that are one parameter (a tied head in the files) the last is taken, as in from_pretrained.
        return {name: _read(model, name, source.tensors[-1][0])}
    converter = copy.deepcopy(source.converter)
    for tensor, pattern in source.tensors:
        converter.add_tensor(name, tensor.name, pattern, partial(_read, model, name, tensor))
    values: dict[str, Tensor | list[Tensor]] = converter.convert(
        name, model=model, config=model.config, hf_quantizer=None, loading_info=info
    )
    return values


def _read(model: PreTrainedModel, name: str, tensor: StoredTensor) -> Tensor:
    """A tensor of a file in the storage dtype of its parameter."""
    value = tensor.read()
    return value.to(storage_dtype(model, name)) if value.is_floating_point() else value
