"""Checked files of large tensors: they come back as they were, or an error names the file.

When a file is read, a CRC-32 of every tensor (some GB/s, far less than what is computed from it) tells damage that
safetensors, which checks the places of its tensors only, does not see.  Tensors that were read are mapped into memory:
nothing is copied.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeq.disk.atomic import write_tensors

# One key, as safetensors writes several in an order that changes from process to process.
HEADER = "checked"


class DamagedFile(ValueError):
    """A file is not what was written."""


def write_checked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, whole or not at all; two processes must not write the same file at once.

    Raises:
        ValueError: The disk is full, or does not take it for another reason.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: _crc32(tensor) for name, tensor in content.items()}
    sums |= {name: zlib.crc32(text.encode()) for name, text in metadata.items()}
    write_tensors(path, content, {HEADER: json.dumps({"metadata": dict(metadata), "crc32": sums}, sort_keys=True)})


def read_checked(path: Path, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors (on the CPU, mapped into memory) of a file.

    Args:
        path: A file of ``write_checked``.
        remedy: What to do about a damaged one, for the message.

    Raises:
        DamagedFile: It is truncated, or anything in it is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata: dict[str, str] = header["metadata"]
        expected = header["crc32"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} is truncated or damaged ({error}); {remedy}") from error
    sums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    sums |= {name: zlib.crc32(text.encode()) for name, text in metadata.items()}
    if sums != expected:
        changed = sorted(sums.items() ^ expected.items())[0][0]
        raise DamagedFile(f"{path} is damaged: {changed} is not what was written; {remedy}")
    return metadata, tensors


def smallest(ids: Tensor) -> Tensor:
    """Whole numbers in the smallest integer dtype that holds them; int64 where none smaller does."""
    if ids.numel() == 0:
        return ids.to(torch.uint8)
    low, high = int(ids.min()), int(ids.max())
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return ids.to(dtype)
    return ids.to(torch.int64)


def _crc32(tensor: Tensor) -> int:
    """Of dtype, shape and values, without a copy of them."""
    start = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), start)  # type: ignore[arg-type]
