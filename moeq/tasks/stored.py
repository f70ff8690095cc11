"""What the original model said of each batch, on disk, for when it and the model under evaluation do not both fit.

The original runs first, over all batches, and is then released; its logits (in its own dtype, bit for bit) and the
experts that it chose (in the smallest integer dtype) wait in one safetensors file per batch.  A file is named after the
plan of its batch, so that any later evaluation with the same batches, of another quantization say, reads it again.
Files appear whole or not at all, are mapped into memory instead of read, and are checked against a CRC-32 of their
values, since a damaged one would silently change every number.

Size: N * V * bytes of the dtype, for N compared positions; 2048 tokens of a vocabulary of 150k are 0.6 GB.

Shapes: N compared positions of a batch, V vocabulary, T tokens that an experts module saw, K experts per token.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeq.run import digest
from moeq.tasks.fingerprint import differences

MANIFEST = "manifest.json"
LOGITS = "logits_NV"
ROUTING = "ids_TK:"
# Left free on the disk beyond what is needed.
SPARE_BYTES = 1 << 28


class Said(NamedTuple):
    """What a model said of a batch.

    Attributes:
        logits_NV: Logits at the positions that are compared.
        routing: Chosen experts ids_TK by path of the experts module.
    """

    logits_NV: Tensor
    routing: dict[str, Tensor]


def plan_key(plan: Any) -> str:
    """SHA-256 over everything in a plan: token ids and how they are laid out."""
    state = hashlib.sha256()
    _update(state, plan)
    return state.hexdigest()[:32]


class StoredOriginal:
    """The original's answers in a folder, which several ranks may share.

    Args:
        folder: Where they are, or will be.
        fingerprint: Identity of the original and of everything that changes its logits; see
            ``moeq.tasks.fingerprint``.

    Raises:
        ValueError: The folder holds those of another original, or files that are none.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        manifest = folder / MANIFEST
        if manifest.is_file():
            self._check(manifest)
        elif folder.exists() and any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} holds safetensors files but no {MANIFEST}; give a folder of its own")
        else:
            _write_manifest(manifest, fingerprint)

    def has(self, plan: Any) -> bool:
        """Whether the batch is stored."""
        return self._path(plan).is_file()

    def check_room(self, num_bytes: int) -> None:
        """Refuse to start writing what the disk has no room for.

        Args:
            num_bytes: Sum over the batches that are not stored yet.

        Raises:
            ValueError: It does not fit.
        """
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if num_bytes > free:
            raise ValueError(
                f"the original's logits need {num_bytes / 1e9:.1f} GB in {self.folder}, which has "
                f"{max(free, 0) / 1e9:.1f} GB left; lower num_documents, leave out the tasks of long texts, compare in "
                "a 16-bit dtype, or choose a run folder on a larger disk"
            )

    def store(self, plan: Any, said: Said) -> None:
        """Write a batch, atomically.

        Raises:
            ValueError: The disk is full.
        """
        path = self._path(plan)
        tensors = {LOGITS: said.logits_NV, **{ROUTING + name: smallest(ids) for name, ids in said.routing.items()}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        sums = json.dumps({name: _crc32(tensor) for name, tensor in tensors.items()})
        metadata = {"fingerprint": digest(self.fingerprint), "crc32": sums}
        # No two ranks have the same batch, and what a kill leaves behind is written over when its batch comes again.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            _sync(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise ValueError(f"{path} could not be written ({error}); make room on its disk and start again") from error

    def load(self, plan: Any) -> Said:
        """Read a batch, mapped into memory, on the CPU; the ids are in a small integer dtype.

        Raises:
            ValueError: It is not stored, or its file is damaged or of another original.
        """
        path = self._path(plan)
        if not path.is_file():
            raise ValueError(f"no logits of the original are stored for this batch ({path}); store it first")
        remedy = "delete it and start again: the original then runs on its batch"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            of, sums = metadata["fingerprint"], json.loads(metadata["crc32"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); {remedy}") from error
        if of != digest(self.fingerprint):
            raise ValueError(f"{path} holds the logits of another original; {remedy}")
        changed = [name for name, tensor in tensors.items() if _crc32(tensor) != sums.get(name)]
        if changed or LOGITS not in tensors or len(tensors) != len(sums):
            raise ValueError(f"{path} is damaged: {changed or 'tensors'} are not what was written; {remedy}")
        logits_NV = tensors.pop(LOGITS)
        return Said(logits_NV, {name.removeprefix(ROUTING): ids_TK for name, ids_TK in tensors.items()})

    def _path(self, plan: Any) -> Path:
        return self.folder / f"{plan_key(plan)}.safetensors"

    def _check(self, manifest: Path) -> None:
        try:
            before = str(json.loads(manifest.read_text(encoding="utf8"))["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} is damaged ({error}); delete its folder") from error
        if before != self.fingerprint:
            why = "; ".join(differences(before, self.fingerprint))
            raise ValueError(
                f"{self.folder} holds the logits of another original ({why}); delete it, or choose another"
            )


def smallest(ids: Tensor) -> Tensor:
    """Whole numbers in the smallest integer dtype that holds them; int64 where none smaller does."""
    if ids.numel() == 0:
        return ids.to(torch.uint8)
    low, high = int(ids.min()), int(ids.max())
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return ids.to(dtype)
    return ids.to(torch.int64)


def _update(state: Any, value: Any) -> None:
    """Feed a value into a hash, with its type and size, so that no two different ones feed the same bytes."""
    if isinstance(value, Tensor):
        state.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        state.update(_bytes(value.detach().cpu().contiguous()))
    elif is_dataclass(value) and not isinstance(value, type):
        _update(state, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)};".encode())
        _update(state, [part for item in value.items() for part in item])
    elif isinstance(value, Iterable) and not isinstance(value, str):
        values = list(value)
        state.update(f"list {len(values)};".encode())
        for part in values:
            _update(state, part)
    else:
        text = repr(value)
        state.update(f"{type(value).__name__} {len(text)} {text};".encode())


def _bytes(tensor: Tensor) -> Any:
    """The values as a buffer, without a copy."""
    return tensor.flatten().view(torch.uint8).numpy()


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor)) if tensor.numel() else 0


def _write_manifest(path: Path, fingerprint: str) -> None:
    """Every rank writes the same; under a name of its own until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    temporary.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf8")
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    """Without it, a power cut after the renaming leaves a whole name on an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
