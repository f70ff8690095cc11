"""GGUF files: written tensor by tensor through the ``gguf`` package, and read back by it.

The package (0.19) does not know the type Q2_0 yet, and has no values of Q1_0: their numbers and bytes are written all
the same, and the reader here turns such bytes into values itself.  Source: docs/gguf.md of ggml.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from torch import Tensor

from moeq.disk.atomic import whole_file
from moeq.formats.gguf_blocks import FILE_TYPES, Bytes


class Whole64(list[int]):
    """Whole numbers of 64 bits, for a key that needs them."""


# Values of one tensor, some of its bytes after another.
Chunks = Callable[[], Iterable[Bytes]]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, its values still to come: type of ``FILE_TYPES``, and shape as torch has it."""

    kind: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape[:-1]) * FILE_TYPES[self.kind].row_bytes(self.shape[-1])


def write_file(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[FileTensor, Chunks]]
) -> None:
    """Write a file; a chunk of a tensor is in memory at a time.

    Args:
        path: Of the file.
        architecture: Name that llama.cpp knows the model by.
        metadata: Keys and values: bool, int (32 bits, unsigned), float (32 bits), str, or lists of one of these; ints
            of lists are signed, those of ``Whole64`` unsigned of 64 bits.
        tensors: What each holds, in the order of the file.

    Raises:
        ValueError: A tensor's chunks do not have its size, or the disk does not take the file.
    """
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, (tensor, _) in tensors.items():
            # The package knows the numbers as an enumeration; any number is written.
            number = cast(gguf.GGMLQuantizationType, FILE_TYPES[tensor.kind].number)
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, number)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            for name, (tensor, chunks) in tensors.items():
                start = file.tell()
                for chunk in chunks():
                    file.write(np.ascontiguousarray(chunk).data)
                if file.tell() - start != tensor.num_bytes:
                    raise ValueError(f"{name} has {file.tell() - start} bytes where {tensor.num_bytes} were declared")
                writer.write_padding(file, tensor.num_bytes)
        finally:
            if writer.fout is not None:
                writer.close()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that was opened, mapped and not read.

    Attributes:
        kind: Type of ``FILE_TYPES``.
        shape: As torch has it.
        rows: Its bytes as the package's reader gives them, [..., bytes of a row] or [..., I].
    """

    kind: str
    shape: tuple[int, ...]
    rows: np.ndarray[Any, Any]

    def values(self, index: int | None = None) -> Tensor:
        """Its values in float32, or those of one index of its first dimension."""
        rows = self.rows if index is None else self.rows[index]
        if self.kind in OWN:
            return OWN[self.kind](torch.from_numpy(np.array(rows)))
        if self.kind == "I32":  # which the package dequantizes not
            return torch.from_numpy(np.array(rows, dtype=np.float32))
        number = gguf.GGMLQuantizationType(FILE_TYPES[self.kind].number)
        return torch.from_numpy(np.array(gguf.dequantize(rows, number), dtype=np.float32))

    def forget(self) -> None:
        """Let go of the pages of the file that were read, which else stay in memory as long as it is mapped."""
        mapped = getattr(self.rows, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors of a file, as the package reads them; nothing is read but its head.

    Raises:
        ValueError: The file is truncated, or no GGUF file.
    """
    reader = _Reader(path)
    kinds = {file_type.number: name for name, file_type in FILE_TYPES.items()}
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: StoredTensor(kinds[int(tensor.tensor_type)], tuple(reversed(tensor.shape.tolist())), tensor.data)
        for tensor in reader.tensors
    }
    return metadata, tensors


def dequantize_q2_0(blocks: Tensor) -> Tensor:
    """Values of Q2_0, [..., I], of its bytes, [..., 18 I / 64]: (q - 1) d."""
    parts = blocks.unflatten(-1, (-1, 18))
    scale = parts[..., :2].contiguous().view(torch.float16).float()
    codes = torch.stack([parts[..., 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    return ((codes.float() - 1) * scale).flatten(-2)


def dequantize_q1_0(blocks: Tensor) -> Tensor:
    """Values of Q1_0, [..., I], of its bytes, [..., 18 I / 128]: (2 q - 1) d."""
    parts = blocks.unflatten(-1, (-1, 18))
    scale = parts[..., :2].contiguous().view(torch.float16).float()
    codes = torch.stack([parts[..., 2:] >> shift & 1 for shift in range(8)], -1).flatten(-2)
    return ((2 * codes.float() - 1) * scale).flatten(-2)


# Types that the package writes and reads as bytes, and does not dequantize.
OWN: dict[str, Callable[[Tensor], Tensor]] = {"Q1_0": dequantize_q1_0, "Q2_0": dequantize_q2_0}


class _Reader(gguf.GGUFReader):
    """The package's reader; tensors of a type that it does not know are bytes."""

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        numbers = {kind.value for kind in gguf.GGMLQuantizationType}
        super()._build_tensors(start_offs, [field for field in fields if int(field.parts[4][0]) in numbers])
        for field in fields:
            number = int(field.parts[4][0])
            if number in numbers:
                continue
            kind = next(file_type for file_type in FILE_TYPES.values() if file_type.number == number)
            dims = field.parts[3]
            rows = tuple(int(size) for size in reversed(dims.tolist()))
            shape = (*rows[:-1], kind.row_bytes(rows[-1]))
            offset = int(start_offs + field.parts[5][0])
            self.tensors.append(
                gguf.ReaderTensor(
                    name=str(bytes(field.parts[1]), encoding="utf-8"),
                    tensor_type=cast(gguf.GGMLQuantizationType, number),
                    shape=dims,
                    n_elements=prod(rows),
                    n_bytes=prod(shape),
                    data_offset=offset,
                    data=self._get(offset, np.uint8, prod(shape)).reshape(shape),
                    field=field,
                )
            )


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Whole64):
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64)
    else:
        writer.add_array(key, value)
