"""Hidden states between blocks, and running one block of a model at a time.

A decoder block is called as the model itself would call it: its arguments (masks, positions, rotary embeddings) are
captured by running the model with every block replaced by a stub that only writes down what it was given.  Neither what
follows the last block (the head is costly) nor what follows the last observed site of a pass is computed.

All batches go through a block before any goes through the next one, so that one block at a time is needed.  Blocks of a
few families hand something on to the next one beside the hidden states (a router's state, chosen tokens).  Their stubs
return ``HANDED_ON`` in its place, so that it is seen where the next block takes it, and ``ActivationStore.enter`` puts
the value there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeq.disk.waiting import WaitingStates
from moeq.models.blocks import BlockCall, fill_in, hand_on


@dataclass(frozen=True)
class BlockBatch:
    """One batch at a block: what the block reads now, and what the original model's returned there.

    Attributes:
        hidden_BTD: Input of the block, made by the quantized blocks before it.
        original_BTD: Output of the original block on the original model's hidden states.
        call: The other arguments of the block.
        keep_BT: bool; False at padding.
    """

    hidden_BTD: Tensor
    original_BTD: Tensor
    call: BlockCall
    keep_BT: Tensor


class BlockBatches(Sequence[BlockBatch]):
    """The batches of this rank at the current block, read where they wait when one is asked for.

    Args:
        inputs: What the block reads.
        originals: What the original block returned.
        calls: The other arguments of the block and the tokens that are no padding, by number of the batch.
    """

    def __init__(
        self, inputs: "ActivationStore", originals: "ActivationStore", calls: Mapping[int, tuple[BlockCall, Tensor]]
    ) -> None:
        self._inputs, self._originals, self._calls = inputs, originals, calls
        self._numbers = sorted(calls)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        number = self._numbers[index]
        call, keep_BT = self._calls[number]
        call = self._inputs.enter(number, self._inputs.block_of(number), call)
        original_BTD = self._originals.at(number, call.hidden.device)
        return BlockBatch(self._inputs.at(number, call.hidden.device), original_BTD, call, keep_BT)


class ActivationStore:
    """For each batch, the input of the block that all batches have reached.

    Args:
        waiting: Where they wait between passes.
    """

    def __init__(self, waiting: WaitingStates) -> None:
        self._waiting = waiting
        self._blocks: dict[int, int] = {}

    def enter(self, batch: int, block: int, call: BlockCall) -> BlockCall:
        """How ``block`` is called on a batch: with what the blocks before it made, and handed on.

        Args:
            batch: Its number; it must have been ``put`` at this block, but at the first one.
            block: Index of the block.
            call: Captured arguments; ``hidden`` is the embedded input.

        Raises:
            ValueError: The batch is at another block.
        """
        if block == 0:
            return call
        if (reached := self.block_of(batch)) != block:
            raise ValueError(f"activations of batch {batch} are at block {reached}, not at block {block}")
        device = call.hidden.device
        key = batch, "handed"
        handed = self._waiting.read(key, device) if key in self._waiting else None
        return fill_in(replace(call, hidden=self.at(batch, device)), handed)

    def put(self, batch: int, block: int, hidden: Tensor, handed: Any = None) -> None:
        """Keep the input of a block: the output of the one before it."""
        if handed is not None and not isinstance(handed, Tensor):
            raise ValueError(f"block {block - 1} hands on a {type(handed).__name__}, which cannot wait between passes")
        self._blocks[batch] = block
        self._waiting.put((batch, "hidden"), hidden)
        if handed is None:
            self._waiting.drop((batch, "handed"))
        else:
            self._waiting.put((batch, "handed"), handed)

    def advance(self, batch: int, block: int, call: BlockCall, module: nn.Module) -> None:
        """Run a block on a batch, whose captured arguments are ``call``, and keep what it makes for the next one."""
        entered = self.enter(batch, block, call)
        self.put(batch, block + 1, *hand_on(module, entered.hidden, entered))

    def block_of(self, batch: int) -> int:
        """The block that a batch has reached."""
        return self._blocks.get(batch, 0)

    def at(self, batch: int, device: torch.device | str) -> Tensor:
        """Input of the block that a batch has reached."""
        return self._waiting.read((batch, "hidden"), device)

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of the states that wait in the memory of a device."""
        return self._waiting.bytes_in_memory if device.type == "cpu" else 0

    def clear(self) -> None:
        """Forget everything: the next pass starts from the embeddings."""
        self._blocks.clear()
        self._waiting.clear()
