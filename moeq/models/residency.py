"""Where the weights of the blocks of a model are: all in memory, or one block at a time.

Whatever reads, changes or runs the weights of a block does it while the block is *resident*:

    with adapter.resident(block):
        run_block(adapter.blocks[block], hidden, call)

Everything outside of the blocks (embeddings, last norm, head) is always there.  A block that leaves forgets what was
written into it; ``change_blocks`` names changes that belong to the model from here on and are made again each time a
block comes back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

# Changes the weights of one block, which is resident; the same each time.
BlockChange = Callable[[int], None]


class Residency(Protocol):
    """Of the blocks of one model."""

    def place(self, device: torch.device | str) -> None:
        """Use this device from here on: for what is always there now, for blocks when they come."""

    def resident(self, block: int) -> AbstractContextManager[None]:
        """Within, the weights of a block are on the device; contexts of one block may be nested."""

    def read_ahead(self, block: int) -> None:
        """Say that a block is next, so that it can be read while another computes."""

    def change_blocks(self, change: BlockChange) -> None:
        """Change every block, now or when it next comes, in the order in which changes were named."""


class InMemory:
    """All blocks are always there."""

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        self._model, self._num_blocks = model, num_blocks

    def place(self, device: torch.device | str) -> None:
        """Move the whole model."""
        self._model.to(device)

    def resident(self, block: int) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def read_ahead(self, block: int) -> None:
        """Nothing to do."""

    def change_blocks(self, change: BlockChange) -> None:
        """Change every block now."""
        for block in range(self._num_blocks):
            change(block)
