"""Where a model came from, for exports: the folder of its source's files, and what of them no parameter holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.sources import pickled_files, stored_in
from moeq.export.carried import unused_tensors
from moeq.quant.spec import Fallback

Draft = Literal["keep", "drop"]
DROPPED = "draft layers left out"
# Names of files that hold weights, in whatever format.
WEIGHTS = [
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data", "*.npz", "*.npy", "*.tflite", "*.mlmodel", "*.nemo", "*.distcp", "original/*", "onnx/*",
]  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What an export takes over from the files of its source.

    Attributes:
        folder: Of the source; None where there are no files (a model that was made in memory).
        carried: Tensors that no parameter of the model is made of, by key, written byte by byte.
        num_draft: How many of them belong to draft layers.
        left_out: Keys that are in no export, with the reason.
    """

    folder: Path | None = None
    carried: Mapping[str, Readable] = field(default_factory=dict)
    num_draft: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def carried_bytes(self) -> int:
        """Of everything that is carried."""
        return sum(tensor.num_bytes for tensor in self.carried.values())

    @property
    def dropped(self) -> list[str]:
        """Keys of draft layers that were left out as asked."""
        return [key for key, reason in self.left_out.items() if reason == DROPPED]

    def fallbacks(self) -> list[Fallback]:
        """What a report has to say."""
        if self.folder is None:
            detail = "the source has no files here: configuration and tokenizer are as transformers writes them"
            return [Fallback("config.json", "source without files", detail)]
        detail = f"{len(self.dropped)} tensors, and the configuration does not announce them, as asked (draft: drop)"
        return [Fallback(self.dropped[0], DROPPED, detail)] if self.dropped else []


def find_origin(model: PreTrainedModel, draft: Draft = "keep") -> Origin:
    """The files of a model and what of them it does not hold.

    Args:
        model: As it was opened, in memory or streamed.
        draft: Whether layers for speculative decoding travel into exports.

    Raises:
        ValueError: ``draft`` is neither keep nor drop, or a file is damaged.
    """
    if draft not in get_args(Draft):
        raise ValueError(f"draft ({draft!r}) must be one of {', '.join(get_args(Draft))}; choose keep")
    folder = source_folder(model)
    if folder is None or not (any(folder.glob("*.safetensors")) or pickled_files(folder)):
        return Origin(folder)
    unused = unused_tensors(model, stored_in(folder), get_model_conversion_mapping(model))
    if draft == "keep":
        return Origin(folder, unused.draft | unused.others, len(unused.draft), unused.reasons)
    return Origin(folder, unused.others, 0, unused.reasons | dict.fromkeys(unused.draft, DROPPED))


def source_folder(model: PreTrainedModel) -> Path | None:
    """Folder with the files that a model was opened from: its own, or the hub's copy here, which may be completed."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    from huggingface_hub import snapshot_download

    revision = getattr(model.config, "_commit_hash", None)
    for local in (False, True):
        try:
            return Path(snapshot_download(name, revision=revision, ignore_patterns=WEIGHTS, local_files_only=local))
        except (OSError, ValueError):  # no such id, no network
            continue
    return None
