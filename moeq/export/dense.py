"""The dense export: an ordinary Hugging Face folder with the dequantized values, for any runtime."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moeq.disk.folder import atomic_folder
from moeq.export.moeq_format import MAX_SHARD, finish_folder
from moeq.models.storage import in_storage_dtypes


def write_dense(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: Path | str,
    overwrite: bool = False,
    *,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` in the dtypes of its source's files, as a folder that ``from_pretrained`` opens.

    It appears complete or not at all.

    Args:
        model: Dense model.
        tokenizer: Its tokenizer, or None.
        directory: Folder to create.
        overwrite: Replace a folder that exists.
        metadata: JSON values for the manifest.

    Raises:
        ValueError: The folder exists and is not empty, or the model holds values that those dtypes do not.
    """
    with in_storage_dtypes(model), atomic_folder(directory, overwrite=overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        finish_folder(folder, tokenizer, kind="dense", metadata=metadata or {})
