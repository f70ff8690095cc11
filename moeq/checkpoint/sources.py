"""Which tensors of a folder's files the parameters of a model are made of, by transformers' own conversions."""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
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

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.dequantized import dequantized, read_description
from moeq.checkpoint.hub import PICKLED, PICKLED_INDEX, weights_missing_in
from moeq.disk.folder import INDEX, weight_files
from moeq.disk.pickled import pickled_tensors
from moeq.disk.tensor_file import stored_tensors
from moeq.models.storage import storage_dtype


@dataclass(frozen=True)
class Source:
    """Where one parameter of the model comes from: its files' tensors with the pattern that each matched."""

    converter: WeightConverter | None
    tensors: tuple[tuple[Readable, str | None], ...]


def stored_in(folder: Path) -> dict[str, Readable]:
    """Every tensor of a folder by its key; quantized weights are dequantized tensors (``moeq.checkpoint.dequantized``).

    Raises:
        ValueError: Files are missing, damaged or of another format, or are quantized in a way that is not read.
    """
    return dequantized(raw_tensors(folder), *read_description(folder))


def raw_tensors(folder: Path) -> dict[str, Readable]:
    """Every tensor of a folder's weight files by its key, as the files hold it.

    Raises:
        ValueError: Files are missing, damaged or of another format.
    """
    paths = weight_files(folder)
    if paths[0].is_file() or (folder / INDEX).is_file():
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{missing[0]} is missing, though {INDEX} names it; download or copy the folder again")
        return {name: tensor for path in paths for name, tensor in stored_tensors(path).items()}
    pickled = pickled_files(folder)
    if not pickled:
        raise ValueError(weights_missing_in(folder))
    if missing := [path for path in pickled if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing, though {PICKLED_INDEX} names it; download or copy the folder again")
    return {name: tensor for path in pickled for name, tensor in pickled_tensors(path).items()}


def pickled_files(folder: Path) -> list[Path]:
    """Weight files of torch's own format: the shards of the index, or the one file; none where there is neither."""
    if (folder / PICKLED_INDEX).is_file():
        content = json.loads((folder / PICKLED_INDEX).read_text(encoding="utf8"))
        return [folder / name for name in sorted(set(content["weight_map"].values()))]
    return [folder / PICKLED] if (folder / PICKLED).is_file() else []


def find_sources(model: PreTrainedModel, stored: Mapping[str, Readable], mapping: list[Any]) -> dict[str, Source]:
    """Which tensors of the files each parameter is made of, by transformers' conversions; unknown ones are left out."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[tuple[Readable, str | None]]] = defaultdict(list)
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
    model: PreTrainedModel,
    name: str,
    source: Source,
    info: LoadStateDictInfo,
    read: Callable[[PreTrainedModel, str, Readable], Tensor] | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    """Parameters that are made of a source, by name.

    Args:
        model: The model.
        name: Of the (first) parameter.
        source: What it is made of.
        info: Takes the errors of conversions.
        read: Gives the values of a tensor of the files; None is in the storage dtype of the parameter.
    """
    read = read or _read
    if source.converter is None:
        # Of several keys that are one parameter (a tied head in the files) the last is taken, as in from_pretrained.
        return {name: read(model, name, source.tensors[-1][0])}
    converter = copy.deepcopy(source.converter)
    for tensor, pattern in source.tensors:
        converter.add_tensor(name, tensor.name, pattern, partial(read, model, name, tensor))
    values: dict[str, Tensor | list[Tensor]] = converter.convert(
        name, model=model, config=model.config, hf_quantizer=None, loading_info=info
    )
    return values


def loading_info() -> LoadStateDictInfo:
    """What conversions write their errors into."""
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _read(model: PreTrainedModel, name: str, tensor: Readable) -> Tensor:
    """A tensor of a file in the storage dtype of its parameter."""
    value = tensor.read()
    return value.to(storage_dtype(model, name)) if value.is_floating_point() else value
