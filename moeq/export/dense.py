"""The dense export: an ordinary Hugging Face folder with the dequantized values, for any runtime."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.model_class import model_class, runs_code
from moeq.checkpoint.names import dense_conversions
from moeq.disk.folder import atomic_folder
from moeq.export.finished import FinishedModel, Progress, silent
from moeq.export.layout import plan_layout
from moeq.export.made import Made
from moeq.export.moeq_format import finish_folder, tally
from moeq.export.stored import as_stored, block_tensors, declared_tensors
from moeq.export.weights import write_weights
from moeq.models.storage import storage_dtype


def write_dense(
    source: FinishedModel,
    tokenizer: Any,
    directory: Path | str,
    overwrite: bool = False,
    *,
    metadata: dict[str, Any] | None = None,
    made: Made | None = None,
    progress: Progress = silent,
) -> None:
    """Write a finished model in the dtypes of its source's files, as a folder that ``from_pretrained`` opens.

    It appears complete or not at all.

    Args:
        source: Dense model, finished block by block.
        tokenizer: Its tokenizer, or None.
        directory: Folder to create.
        overwrite: Replace a folder that exists.
        metadata: JSON values for the manifest.
        made: For its card; None is what the model itself tells.
        progress: Shows how many blocks are written.

    Raises:
        ValueError: The folder exists and is not empty, or the model holds values that those dtypes do not.
    """
    with atomic_folder(directory, overwrite=overwrite) as folder:
        fill_dense(source, tokenizer, folder, metadata=metadata, made=made, progress=progress)


def fill_dense(
    source: FinishedModel,
    tokenizer: Any,
    folder: Path,
    *,
    metadata: dict[str, Any] | None = None,
    made: Made | None = None,
    progress: Progress = silent,
) -> None:
    """Write the files of a dense export into an empty folder; see ``write_dense``."""
    layout = plan_layout(_skeleton(source.model), declared_tensors(source.model), source.origin.carried)
    write_weights(source, layout, lambda block: _block(source, block), folder, progress)
    counts = tally("dense", layout, source)
    finish_folder(folder, source, tokenizer, counts, kind="dense", metadata=metadata or {}, made=made)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the meta device, in the dtype of its files."""
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class(model.config).from_config(
            copy.deepcopy(model.config), dtype=storage_dtype(model), trust_remote_code=runs_code(model)
        )
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    skeleton._weight_conversions = dense_conversions(model)
    return skeleton


def _block(source: FinishedModel, block: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in block_tensors(source, block):
        yield name, as_stored(source.model, name, tensor)
