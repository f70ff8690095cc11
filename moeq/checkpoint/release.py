"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys

import torch


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
