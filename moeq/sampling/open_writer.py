"""The model that writes, for as long as it is needed: opened, used, and its memory given back."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from moeq.checkpoint.packed_self import packed_bytes, packed_self
from moeq.checkpoint.prepare import ROOM, prepare
from moeq.checkpoint.release import release_memory
from moeq.models.adapter import Adapter
from moeq.models.visits import visiting_blocks
from moeq.sampling.writer import BITS, Writer, WriterSizes, work_bytes

T = TypeVar("T")


def use_writer(adapter: Adapter, writer: Writer, device: torch.device, use: Callable[[Any], T]) -> T:
    """What ``use(model)`` gives; the model takes its inputs on the device, and is gone afterwards.

    Args:
        adapter: Of the original, in memory or streamed; changes of its blocks (a rotation) are in the writer, too.
        writer: Which form of it writes.
        device: Where it computes.
        use: Keeps nothing of the model.
    """
    try:
        return _use(adapter, writer, device, use)
    finally:
        # Not in the frame that still holds the model.
        release_memory(device)


def _use(adapter: Adapter, writer: Writer, device: torch.device, use: Callable[[Any], T]) -> T:
    with torch.no_grad(), _opened(adapter, writer, device) as model:
        return use(model)


@contextmanager
def _opened(adapter: Adapter, writer: Writer, device: torch.device) -> Iterator[nn.Module]:
    if writer in BITS:
        model = packed_self(adapter, BITS[writer])
        prepare(model)
        yield model
        return
    with ExitStack() as stack:
        if writer == "lockstep":
            stack.callback(adapter.residency.place, device)
            adapter.residency.place("cpu")
        for block in range(len(adapter.blocks)):
            adapter.residency.read_ahead(block + 1)
            stack.enter_context(adapter.resident(block))
        release_memory(device)
        if writer == "lockstep":
            stack.enter_context(visiting_blocks(adapter.model, device))
        yield adapter.model


def writer_sizes(
    adapter: Adapter, device: torch.device, *, rows: int, length: int, device_free: int, host_free: int
) -> WriterSizes:
    """What each writer takes, told from shapes.

    Args:
        adapter: Of the original.
        device: Where it is going to write.
        rows: Sequences at once times branches.
        length: Tokens of a sequence.
        device_free: Bytes that are free there.
        host_free: Bytes that are free in main memory.
    """
    model: Any = adapter.model
    return WriterSizes(
        original=_num_bytes(model),
        packed={writer: int((1 + ROOM) * packed_bytes(adapter, bits)) for writer, bits in BITS.items()},
        block=max(map(_num_bytes, adapter.blocks)),
        work=work_bytes(model.config.get_text_config(), rows, length, model.dtype.itemsize),
        device_free=device_free,
        host_free=host_free,
        on_host=device.type == "cpu",
    )


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
