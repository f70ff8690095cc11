"""Blocks that wait on the host and visit the device in turn: a model that fits the host's memory but not the device's.

Everything outside of the blocks is on the device; a block is copied there when it is called, and its copy is dropped
when it returns.  All rows of a batch pass a block while it is there, so the copies are paid once per step.  On CUDA the
next block is copied on a stream of its own while this one computes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.models.adapter import find_blocks

# A module, the name of one of its own tensors, whether it is a buffer, and the tensor.
_Place = tuple[nn.Module, str, bool, Any]


@contextmanager
def visiting_blocks(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Within, the model takes its inputs and gives its outputs on a device; in the end all of it is where it was.

    Args:
        model: Whole, in main memory; blocks run in the order of their list.  Its weights are only read.
        device: Where it computes.
    """
    device = torch.device(device)
    _, blocks = find_blocks(model)
    homes = [_places(block) for block in blocks]
    inside = {id(tensor) for places in homes for *_, tensor in places}
    outside = [place for place in _places(model) if id(place[-1]) not in inside]
    visits = _Visits(homes, device)
    with ExitStack() as stack:
        stack.callback(_put, outside)
        _put(_copies(outside, device))
        for index, block in enumerate(blocks):
            stack.callback(_put, homes[index])
            stack.callback(block.register_forward_pre_hook(visits.arrive(index)).remove)
            stack.callback(block.register_forward_hook(visits.leave(index), always_call=True).remove)
        yield


class _Visits:
    """The copy of the block that is there, and on CUDA of the one that is next."""

    def __init__(self, homes: list[list[_Place]], device: torch.device) -> None:
        self._homes, self._device = homes, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[int, list[_Place]] | None = None

    def arrive(self, index: int) -> Any:
        """A pre-hook that gives a block its copy."""

        def hook(*_: Any) -> None:
            _put(self._take(index))

        return hook

    def leave(self, index: int) -> Any:
        """A hook that gives a block its own tensors again."""

        def hook(*_: Any) -> None:
            _put(self._homes[index])
            # After the products of this block were started: its copy does not keep them waiting.
            if self._side is not None:
                self._prefetch((index + 1) % len(self._homes))

        return hook

    def _take(self, index: int) -> list[_Place]:
        ready, self._next = self._next, None
        if ready is None or ready[0] != index:
            return _copies(self._homes[index], self._device)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._side)  # type: ignore[arg-type]
        for *_, tensor in ready[1]:
            tensor.record_stream(stream)
        return ready[1]

    def _prefetch(self, index: int) -> None:
        with torch.cuda.stream(self._side):
            self._next = index, _copies(self._homes[index], self._device)


def _places(module: nn.Module) -> list[_Place]:
    """Every parameter and buffer with the place where its module has it."""
    found: list[_Place] = []
    for owner in module.modules():
        found += [(owner, leaf, False, tensor) for leaf, tensor in owner._parameters.items() if tensor is not None]
        found += [(owner, leaf, True, tensor) for leaf, tensor in owner._buffers.items() if tensor is not None]
    return found


def _copies(places: list[_Place], device: torch.device) -> list[_Place]:
    """The same places with tensors on a device; one of several places is one copy."""
    made: dict[int, Tensor] = {}
    for *_, is_buffer, tensor in places:
        if id(tensor) not in made:
            moved = tensor.detach().to(device, non_blocking=True, copy=True)
            made[id(tensor)] = moved if is_buffer else nn.Parameter(moved, requires_grad=False)
    return [(owner, leaf, is_buffer, made[id(tensor)]) for owner, leaf, is_buffer, tensor in places]


def _put(places: list[_Place]) -> None:
    for owner, leaf, is_buffer, tensor in places:
        (owner._buffers if is_buffer else owner._parameters)[leaf] = tensor
