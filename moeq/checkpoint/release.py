"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from torch import nn

_MAPS = Path("/proc/self/maps")
# M_MMAP_THRESHOLD of malloc.h, and what it is set to.
_THRESHOLD_OPTION, _MAPPED_BYTES = -3, 1 << 20


def map_large_tensors() -> None:
    """Let the C library give tensors of a megabyte and more pages of their own, where it can be told to (glibc).

    They leave memory when they are freed.  By itself it soon puts tensors of up to 32 MB on its heap, where those that
    stay keep those that are gone: a process grows with every block, in memory and in addresses.
    """
    if sys.platform == "linux" and (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        option(_THRESHOLD_OPTION, _MAPPED_BYTES)


def leave_files(model: nn.Module) -> None:
    """Copy the tensors of a model that lie in mapped files, one after another, so that the files can be let go.

    transformers maps the files of a checkpoint, and one tensor that it did not copy keeps all of their pages in memory.
    Where the system does not tell what is mapped (no Linux), nothing is copied.
    """
    mapped = _mapped_files()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and any(tensor.data_ptr() in addresses for addresses in mapped):
            tensor.data = tensor.data.clone()


def _mapped_files() -> list[range]:
    """Addresses at which this process reads files; memory that it shares with others is not among them."""
    try:
        lines = _MAPS.read_text(encoding="utf8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/") and rights.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(range(start, end))
    return found


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, what the device's allocator holds for later, and the heap."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Let the C library give back what was freed, where it can be told to (glibc); milliseconds.

    Tensors below some megabytes lie on its heap, which keeps what is freed between others: without this a process grows
    by a part of every block that came and left.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
