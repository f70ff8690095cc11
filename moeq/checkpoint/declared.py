"""A model without weights, declared as one that is loaded whole: dtypes of parameters, buffers that no file holds."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.sources import Source, find_sources, loading_info, made_of, raw_tensors
from moeq.checkpoint.values import put
from moeq.models.float32 import computed_in_float32
from moeq.models.storage import FileTensor, note_files


def declare_dtypes(model: PreTrainedModel, dtype: torch.dtype, wider: Iterable[str] = ()) -> None:
    """Declare the dtypes of parameters that transformers keeps in float32, or files have and the model computes in.

    Args:
        model: On the meta device.
        dtype: Of the others.
        wider: Names of tensors that files hold in float32.
    """
    kept = [*(model._keep_in_fp32_modules_strict or ())] if dtype != torch.float32 else []
    kept += [*(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
    computed = computed_in_float32(model, wider)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Parts of a path, one or several, as transformers matches them.
        if tensor.is_floating_point() and (name in computed or any(f".{part}." in f".{name}." for part in kept)):
            tensor.data = tensor.data.float()


def wider_in_files(model: PreTrainedModel, dtype: torch.dtype, sources: Mapping[str, Source]) -> dict[str, FileTensor]:
    """Tensors that files hold in a wider dtype than that of the model, by name."""
    found = {}
    for name, source in sources.items():
        widest = max((tensor.dtype for tensor, _ in source.tensors), key=lambda each: each.itemsize)
        if widest.is_floating_point and widest.itemsize > dtype.itemsize:
            found[name] = FileTensor(widest, partial(_as_in_files, model, name, source))
    return found


def restore_float32(model: PreTrainedModel, folder: Path, mapping: list[Any]) -> None:
    """Give a model that ``from_pretrained`` opened its float32 tensors back, as far as it computes in them.

    Args:
        model: In memory.
        folder: Its folder.
        mapping: Conversions from its files, in loading direction.

    Raises:
        ValueError: A file is damaged.
    """
    if model.dtype == torch.float32:
        return
    used = model._weight_conversions
    stored = {key: tensor for key, tensor in raw_tensors(folder).items() if tensor.dtype == torch.float32}
    wider = wider_in_files(model, model.dtype, find_sources(model, stored, mapping))
    model._weight_conversions = used
    for name in computed_in_float32(model, wider):
        put(model, name, wider[name].read().to(model.get_parameter_or_buffer(name).device))
    note_files(model, wider)


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


def _as_in_files(model: PreTrainedModel, name: str, source: Source) -> Tensor:
    value = made_of(model, name, source, loading_info(), _read)[name]
    return value[0] if isinstance(value, list) else value


def _read(model: PreTrainedModel, name: str, tensor: Readable) -> Tensor:
    return tensor.read()
