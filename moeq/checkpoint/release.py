"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys

import torch

# M_MMAP_THRESHOLD of malloc.h, and what it is set to.
_THRESHOLD_OPTION, _MAPPED_BYTES = -3, 1 << 20


def map_large_tensors() -> None:
    """Let the C library give tensors of a megabyte and more pages of their own, where it can be told to (glibc).

    They leave memory when they are freed.  By itself it soon puts tensors of up to 32 MB on its heap, where those that
    stay keep those that are gone: a process grows with every block, in memory and in addresses.
    """
    if sys.platform == "linux" and (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        option(_THRESHOLD_OPTION, _MAPPED_BYTES)


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
