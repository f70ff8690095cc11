"""The dense export: an ordinary Hugging Face folder with the dequantized values, for any runtime."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moeq.disk.folder import atomic_folder
from moeq.export.moeq_format import MAX_SHARD, finish_folder


def write_dense(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: Path | str,
    overwrite: bool = False,
    *,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` as it is; the folder appears complete or not at all, and ``from_pretrained`` opens it.

    Args:
        model: Dense model.
        tokenizer: Its tokenizer, or None.
        directory: Folder to create.
        overwrite: Replace a folder that exists.
        metadata: JSON values for the manifest.

    Raises:
        ValueError: The folder exists and is not empty.
    """
    with atomic_folder(directory, overwrite=overwrite) as folder:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        finish_folder(folder, tokenizer, kind="dense", metadata=metadata or {})
