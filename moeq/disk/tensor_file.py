"""Safetensors files tensor by tensor: read into memory of its own, written piece by piece into a file of known shape.

Files are not mapped into memory: what is read counts once, lies aligned, and a file that shrinks or a disk that fails
is an error, not a signal.
"""

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def read(self) -> Tensor:
        """Its values, in memory of its own.

        Raises:
            ValueError: The file ends before it.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy())
        with self.path.open("rb", buffering=0) as file:
            done = 0
            while done < self.num_bytes:
                count = os.preadv(file.fileno(), [view[done:]], self.start + done)
                if count == 0:
                    raise ValueError(f"{self.path} ends before {self.name}; export or copy it again")
                done += count
        return buffer.view(self.dtype).view(self.shape)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a file by name, from its header.

    Raises:
        ValueError: The file is missing, truncated, damaged, or holds a dtype that torch has not.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is missing, truncated or damaged ({error}); export or copy it again") from error
    if found and size < (end := max(tensor.start + tensor.num_bytes for tensor in found.values())):
        raise ValueError(f"{path} has {size} bytes of {end}: it is truncated; export or copy it again")
    return found


def _entry(path: Path, name: str, entry: dict[str, Any], data: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
    return StoredTensor(path, name, dtype, shape, data + begin, end - begin)


def read_ahead(tensors: Iterable[StoredTensor]) -> None:
    """Ask the system to read tensors into its cache in the background; nothing happens where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    by_path: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_path.setdefault(tensor.path, []).append(tensor)
    for path, parts in by_path.items():
        # What is wrong with a file shows when it is read.
        with suppress(OSError), path.open("rb", buffering=0) as file:
            for start, length in _joined(parts):
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _joined(parts: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """Byte ranges (start, length) of tensors, those that touch as one."""
    ranges: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: part.start):
        if ranges and sum(ranges[-1]) == part.start:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + part.num_bytes
        else:
            ranges.append((part.start, part.num_bytes))
    return ranges
