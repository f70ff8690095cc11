"""Sweeps of a few batches over all blocks of a model, whose blocks are resident one at a time.

All batches go through a block before any goes through the next one.  What a block reads of each batch waits in
``BlockStates`` for whoever runs that block again: in the order of the blocks, or in reverse.

Shapes: B batch, T tokens of a sequence, D width, L blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, fill_in, hand_on

Inputs = dict[str, Tensor]
Key = tuple[str | int, ...]
# Shows how far a sweep is: gives the blocks on, in their order, under the name of the sweep.
Show = Callable[[Iterable[int], str], Iterable[int]]


def unseen(blocks: Iterable[int], _: str) -> Iterable[int]:
    """A ``Show`` that shows nothing."""
    return blocks


def original(batch: int, block: int) -> Key:
    """Key of what a block reads of a batch in the original model; the block after the last stands for its output."""
    return "original", batch, block


class BlockStates:
    """Inputs of blocks by key: hidden states, and what the block before hands on beside them.

    Args:
        waiting: Where they wait.
    """

    def __init__(self, waiting: WaitingStates) -> None:
        self._waiting = waiting
        self._keys: set[Key] = set()

    def put(self, key: Key, hidden: Tensor, handed: Any = None) -> None:
        """Keep the output of a block, as ``hand_on`` gives it."""
        self._put((*key, "hidden"), hidden)
        if isinstance(handed, Tensor):
            self._put((*key, "handed"), handed)

    def put_rows(self, key: Key, hidden_BTD: Tensor) -> None:
        """Keep the output of the last block sequence by sequence, as the head is to read it: key and row."""
        for row, hidden_1TD in enumerate(hidden_BTD.split(1)):
            self._put((*key, row, "hidden"), hidden_1TD)

    def read(self, key: Key, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Hidden states and what is handed on; they must not be changed."""
        handed = (*key, "handed")
        return (
            self._waiting.read((*key, "hidden"), device),
            self._waiting.read(handed, device) if handed in self._keys else None,
        )

    def drop(self, key: Key) -> None:
        """Forget what waits under a key."""
        for full in ((*key, "hidden"), (*key, "handed")):
            self._waiting.drop(full)
            self._keys.discard(full)

    def clear(self) -> None:
        """Forget everything that was put here."""
        for key in self._keys:
            self._waiting.drop(key)
        self._keys.clear()

    def _put(self, key: Key, tensor: Tensor) -> None:
        self._waiting.put(key, tensor)
        self._keys.add(key)


@contextmanager
def visit(adapter: Adapter, block: int, following: int) -> Iterator[None]:
    """Within, a block is resident, and the one that follows is read ahead, if there is one."""
    with adapter.resident(block):
        if 0 <= following < len(adapter.blocks):
            adapter.residency.read_ahead(following)
        yield


def captured(adapter: Adapter, inputs: Inputs, block: int) -> BlockCall:
    """How the model calls a block; ``hidden`` is the embedded input, and what is handed on is a mark."""
    return capture_calls(adapter.model, adapter.blocks, inputs, last=block)[-1]


def entered(call: BlockCall, hidden: Tensor, handed: Any) -> BlockCall:
    """A call with what the blocks before made."""
    return fill_in(replace(call, hidden=hidden), handed)


def keep_N(inputs: Inputs) -> Tensor | None:
    """Which tokens of a batch are no padding, bool [B * T]; None is all."""
    mask_BT = inputs.get("attention_mask")
    return None if mask_BT is None else mask_BT.flatten().bool()


@torch.no_grad()
def sweep_forward(adapter: Adapter, batches: Mapping[int, Inputs], states: BlockStates, show: Show) -> None:
    """Run batches through all blocks; what each block reads is kept, and the last output, sequence by sequence.

    The first block reads what ``captured`` gives, which is not kept.
    """
    num_blocks = len(adapter.blocks)
    for block in show(range(num_blocks), "forward"):
        with visit(adapter, block, block + 1):
            for batch, inputs in batches.items():
                call = captured(adapter, inputs, block)
                if block:
                    call = entered(call, *states.read(original(batch, block), call.hidden.device))
                hidden, handed = hand_on(adapter.blocks[block], call.hidden, call)
                if block + 1 < num_blocks:
                    states.put(original(batch, block + 1), hidden, handed)
                else:
                    states.put_rows(original(batch, num_blocks), hidden)
