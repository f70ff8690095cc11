"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys

import torch


def release_memory(device: torch.device) -> None:
    """Give back what the device's allocator holds for later, and the C library where it can be told to (glibc).

    Tensors below some megabytes lie on the heap of the C library, which keeps what is freed between others.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
