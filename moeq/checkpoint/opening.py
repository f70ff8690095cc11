"""Opening a source: the model without weights, and what each of its tensors is made of, all of which is there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.complete import complete
from moeq.checkpoint.configuration import load_config
from moeq.checkpoint.declared import declare_dtypes, make_unsaved_buffers
from moeq.checkpoint.finite import check_finite_weights
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.sources import Source, find_sources, stored_in
from moeq.checkpoint.values import FileValues
from moeq.models.storage import widen


def open_whole(
    folder: Path,
    dtype: torch.dtype | None,
    compute: Callable[[torch.dtype], torch.dtype],
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model with all of its weights in memory, in training mode off and without gradients; see ``open_sources``."""
    model, sources = open_sources(folder, dtype, compute, trust_remote_code=trust_remote_code)
    FileValues(model, sources).load_all()
    check_finite_weights(model)
    return model


def open_sources(
    folder: Path,
    dtype: torch.dtype | None,
    compute: Callable[[torch.dtype], torch.dtype],
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, Source]]:
    """A model on the meta device and what it is made of, all of which is there; see ``open_stream``."""
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is packed by moeq, so its blocks cannot be streamed; set --model.placement memory")
    stored = stored_in(folder)
    held = dtype or config.dtype or next(t.dtype for t in stored.values() if t.dtype.is_floating_point)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=held, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    mapping = get_model_conversion_mapping(model)
    wide = compute(held) != held
    return model, prepare(model, held, stored, mapping, wide=wide, as_in_files=dtype is None)


def prepare(
    model: PreTrainedModel,
    dtype: torch.dtype,
    stored: Mapping[str, Readable],
    mapping: list[Any],
    *,
    wide: bool,
    as_in_files: bool = True,
) -> dict[str, Source]:
    """Declare the dtypes of a model on the meta device, and find what its tensors are made of.

    Args:
        model: In its storage dtype; it is in evaluation mode without gradients afterwards.
        dtype: Storage dtype.
        stored: Tensors of the files by key.
        mapping: Conversions from files to this model, in loading direction.
        wide: Hold it in float32.
        as_in_files: Tensors that files hold in another dtype keep it: in exports, and in memory where the model
            computes in it.

    Raises:
        ValueError: The files lack tensors of the model, or a tensor has another shape.
    """
    sources = complete(model, find_sources(model, stored, mapping), stored)
    declare_dtypes(model, dtype, sources if as_in_files else None)
    model.eval().requires_grad_(False)
    if wide:
        widen(model)
    make_unsaved_buffers(model)
    return sources
