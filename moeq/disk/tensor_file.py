"""Safetensors files tensor by tensor: read into memory of its own, written piece by piece into a file of known shape.

Files are not mapped into memory: what is read counts once, lies aligned, and a file that shrinks or a disk that fails
is an error, not a signal.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.disk.atomic import whole_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# In which the safetensors library lays out a file: wide numbers first, so that all of them lie aligned.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8",
    "U8", "BOOL",
)  # fmt: skip
_ALIGNMENT = 8  # bytes, of the header
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

    @property
    def parts(self) -> "tuple[StoredTensor]":
        """What lies in files of it: itself."""
        return (self,)

    def read(self) -> Tensor:
        """Its values, in memory of its own.

        Raises:
            ValueError: The file ends before it.
        """
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
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


@dataclass(frozen=True)
class Declared:
    """Dtype and shape of a tensor that is still to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFileWriter:
    """Takes the tensors of one file as they come; made by ``tensor_file_writer``."""

    def __init__(self, path: Path, file: Any, places: Mapping[str, tuple[Declared, int]]) -> None:
        self._path, self._file, self._places = path, file, dict(places)
        self._waiting = set(places)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, from any device, at its place.

        Raises:
            ValueError: It was not declared, not with this dtype or shape, or is there already.
        """
        if name not in self._waiting:
            state = "was written before" if name in self._places else "was not declared"
            raise ValueError(f"{name} {state} for {self._path}; write each declared tensor once")
        declared, start = self._places[name]
        if (tensor.dtype, tuple(tensor.shape)) != (declared.dtype, declared.shape):
            raise ValueError(
                f"{name} of {self._path} is {tensor.dtype} {tuple(tensor.shape)}, declared was {declared.dtype} "
                f"{declared.shape}; write what was declared"
            )
        flat = tensor.detach().cpu().contiguous()
        # A dimension of one may have any stride, which a view as bytes refuses.
        octets = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
        view, done = octets.numpy().data, 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], start + done)
        self._waiting.remove(name)

    def check_complete(self) -> None:
        """Raise ValueError where a declared tensor was not written."""
        if self._waiting:
            first = min(self._waiting)
            raise ValueError(f"{self._path} lacks {len(self._waiting)} declared tensors, first {first}; write them")


@contextmanager
def tensor_file_writer(
    path: Path, declared: Mapping[str, Declared], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFileWriter]:
    """Write a safetensors file whose tensors are known before their values, in any order, one at a time in memory.

    The file is, to the byte, the one that the safetensors library writes, and appears whole or not at all.

    Args:
        path: Of the file.
        declared: Every tensor by name.
        metadata: Of the header.

    Raises:
        ValueError: A declared tensor was not written, or the disk does not take the file (``whole_file``).
    """
    header, places, end = _header(declared, metadata)
    with whole_file(path) as temporary, temporary.open("wb", buffering=0) as file:
        file.write(header)
        os.truncate(file.fileno(), end)
        writer = TensorFileWriter(path, file, places)
        yield writer
        writer.check_complete()


def _header(
    declared: Mapping[str, Declared], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, tuple[Declared, int]], int]:
    """Bytes of a header, place of each tensor in the file, and the size of the file."""
    names = sorted(declared, key=lambda name: (_ORDER.index(_NAMES[declared[name].dtype]), name.encode()))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name in names:
        begins[name], end = end, end + declared[name].num_bytes
        kind = _NAMES[declared[name].dtype]
        entries[name] = {"dtype": kind, "shape": list(declared[name].shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = 8 + len(text)
    places = {name: (declared[name], data + begin) for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, places, data + end


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
