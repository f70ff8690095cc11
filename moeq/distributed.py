"""What ranks exchange: sums in a fixed order, and lists of results.  Everything is the identity on one rank."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True inside a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum each tensor over the ranks in place, in the order of the list (which must be equal on every rank)."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(tensor: Tensor, source: int) -> None:
    """Give a contiguous tensor of every rank the values that the source's has, in place, bit for bit in any dtype."""
    if is_distributed():
        octets = tensor.view(-1).view(torch.uint8)
        # NCCL moves what is on a GPU, and results wait on the CPU.
        carrier = octets.cuda() if dist.get_backend() == "nccl" and octets.is_cpu else octets
        dist.broadcast(carrier, source)
        if carrier is not octets and dist.get_rank() != source:
            octets.copy_(carrier)


def wait_for_ranks() -> None:
    """Return when every rank has come here."""
    if is_distributed():
        dist.barrier()


def gather_lists(items: list[Any]) -> list[Any]:
    """Items of all ranks in rank order, on every rank."""
    if not is_distributed():
        return items
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
