"""Times on a device: of an operation, of what it cannot do without, and rates that the device really reaches."""

import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch

# Numbers of a square product, bytes of a copy.
PRODUCT, COPY = 4096, 1 << 30


def settle(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median of some calls, each waited for, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        settle(device)
        start = time.perf_counter()
        work()
        settle(device)
        times.append(time.perf_counter() - start)
    return median(times)


def device_seconds(work: Callable[[int], object], device: torch.device, calls: int = 16) -> float:
    """Of one of so many different calls, without what the host takes to start them.

    On CUDA the calls are one graph, so that launches are not what is measured; elsewhere they are called.

    Args:
        work: Given the number of the call, so that each can use other data than the one before.
        device: Where it works.
        calls: How many.
    """
    for number in range(calls):
        work(number)
    if device.type != "cuda":
        return seconds(lambda: [work(number) for number in range(calls)], device, 1) / calls
    settle(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            work(number)
    return seconds(graph.replay, device, 10) / calls


@cache
def product_rate(dtype: torch.dtype, device: torch.device, size: int = PRODUCT) -> float:
    """Operations per second of a square product of random numbers."""
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: x @ y, device)


@cache
def copy_rate(device: torch.device, num_bytes: int = COPY) -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device)


def peak_bytes(device: torch.device) -> int:
    """Most that was allocated on the device since ``start_peak``; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def start_peak(device: torch.device) -> None:
    """Measure the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
