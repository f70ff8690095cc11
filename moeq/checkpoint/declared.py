"""A model without weights, declared as one that is loaded whole: dtypes of parameters, buffers that no file holds."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.sources import Source, find_sources, loading_info, made_of, raw_tensors
from moeq.checkpoint.values import named_tensors, put
from moeq.models.float32 import computed_in_float32
from moeq.models.storage import FileTensor, note_files


def declare_dtypes(model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, Source] | None = None) -> None:
    """Declare the dtypes of parameters that are held in float32, and note where files hold another.

    These are the ones that transformers keeps in float32, and those that files hold in it, as far as the model computes
    with them.

    Args:
        model: On the meta device.
        dtype: Of the others.
        sources: What the tensors of the model are made of, by name; None where nothing is to be as in the files.
    """
    kept = [*(model._keep_in_fp32_modules_strict or ())] if dtype != torch.float32 else []
    kept += [*(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
    in_files = {name: _file_dtype(source) for name, source in (sources or {}).items()}
    wider = [name for name, stored in in_files.items() if stored.is_floating_point and stored.itemsize > dtype.itemsize]
    computed = computed_in_float32(model, wider)
    for name, tensor in named_tensors(model):
        # Parts of a path, one or several, as transformers matches them.
        if tensor.is_floating_point() and (name in computed or any(f".{part}." in f".{name}." for part in kept)):
            tensor.data = tensor.data.float()
    note_as_in_files(model, dtype, sources or {})


def note_as_in_files(model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, Source]) -> None:
    """Note the tensors that files hold in a wider dtype than the model, or in its dtype where the model is wider.

    Args:
        model: In the dtypes in which it is held, not widened.
        dtype: Of the model.
        sources: What its tensors are made of, by name.
    """
    noted = {}
    for name, source in sources.items():
        held, stored = model.get_parameter_or_buffer(name).dtype, _file_dtype(source)
        wider = stored.is_floating_point and stored.itemsize > held.itemsize
        if wider or (stored == dtype and stored.itemsize < held.itemsize):
            noted[name] = FileTensor(stored, partial(_as_in_files, model, name, source))
    note_files(model, noted)


def restore_float32(model: PreTrainedModel, folder: Path, mapping: list[Any]) -> None:
    """Hold a model that ``from_pretrained`` opened as one that is loaded here: see ``declare_dtypes``.

    Args:
        model: In memory, in the dtype of its folder.
        folder: Its folder, not quantized but by moeq.
        mapping: Conversions from its files, in loading direction.

    Raises:
        ValueError: A file is damaged.
    """
    used = model._weight_conversions
    sources = find_sources(model, raw_tensors(folder), mapping)
    model._weight_conversions = used
    dtype = model.dtype
    wider = [name for name, source in sources.items() if _file_dtype(source) == torch.float32 != dtype]
    for name in computed_in_float32(model, wider):
        put(model, name, _as_in_files(model, name, sources[name]))
    note_as_in_files(model, dtype, sources)


def make_unsaved_buffers(model: PreTrainedModel) -> None:
    """Compute what no file holds (rotary frequencies, slopes) on the CPU, as a model that is loaded whole does."""
    owners = {name.rpartition(".")[0] for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta}
    for path in owners:
        module = model.get_submodule(path)
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)


def _file_dtype(source: Source) -> torch.dtype:
    return max((tensor.dtype for tensor, _ in source.tensors), key=lambda dtype: dtype.itemsize)


def _as_in_files(model: PreTrainedModel, name: str, source: Source) -> Tensor:
    value = made_of(model, name, source, loading_info(), _read)[name]
    return value[0] if isinstance(value, list) else value


def _read(model: PreTrainedModel, name: str, tensor: Readable) -> Tensor:
    return tensor.read()
