"""Hidden states between blocks, and running one block of a model at a time.

A decoder block is called as the model itself would call it: its arguments (masks, positions, rotary embeddings) are
captured by running the model with every block replaced by a stub that only writes down what it was given.  Neither what
follows the last block (the head is costly) nor what follows the last observed site of a pass is computed.

Blocks of a few families hand something on to the next one beside the hidden states (a router's state, chosen tokens).
Their stubs return ``HANDED_ON`` in its place, so that it is seen where the next block takes it, and
``ActivationStore.advance`` puts the value there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


class ActivationStore:
    """For each batch, the input of the furthest block reached so far.

    Args:
        device: Where the hidden states wait between passes ("cpu" bounds the memory of the accelerator).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._states: dict[int, tuple[int, Tensor, Any]] = {}

    def advance(self, batch: int, block: int, calls: list[BlockCall], blocks: nn.ModuleList) -> Tensor:
        """Input of ``block`` for a batch, made by running the blocks between it and the last one stored.

        In ``calls``, what earlier blocks hand on to this one is filled in.  The block after the last one stands for the
        output of all blocks.
        """
        reached, hidden, handed = self._states.get(batch, (0, calls[0].hidden, None))
        if reached > block:
            raise ValueError(f"activations of batch {batch} are at block {reached}, past block {block}: clear first")
        device = calls[0].hidden.device
        hidden, handed = hidden.to(device), _moved(handed, device)
        for index in range(reached, block):
            calls[index] = fill_in(calls[index], handed)
            hidden, handed = hand_on(blocks[index], hidden, calls[index])
        if block < len(calls):
            calls[block] = fill_in(calls[block], handed)
        self._states[batch] = (block, hidden.to(self.device), _moved(handed, self.device))
        return hidden

    def latest(self, batch: int) -> Tensor:
        """Input of the furthest block that a batch has reached, where it waits."""
        return self._states[batch][1]

    def num_bytes(self, device: torch.device) -> int:
        """Bytes of the stored states, if they are on ``device``."""
        states = [hidden for _, hidden, _ in self._states.values() if hidden.device.type == device.type]
        return sum(hidden.numel() * hidden.element_size() for hidden in states)

    def clear(self) -> None:
        """Forget everything: the next pass starts from the embeddings."""
        self._states.clear()


def _moved(handed: Any, device: torch.device) -> Any:
    return handed.to(device) if isinstance(handed, Tensor) else handed
