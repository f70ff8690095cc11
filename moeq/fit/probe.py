"""A few tokens that are taken through the blocks with the batches: how a block can be run to try something on it."""

import torch

from moeq.disk.waiting import WaitingStates
from moeq.fit.activations import ActivationStore
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, hands_on

_NUM_TOKENS = 16


class Probe:
    """The same tokens on every rank.

    Args:
        adapter: The model.
        waiting: Where what blocks hand on waits; it is small.
    """

    def __init__(self, adapter: Adapter, waiting: WaitingStates) -> None:
        self.adapter = adapter
        self._store = ActivationStore(waiting)
        self._hands_on = hands_on(adapter.blocks)

    def call(self, block: int) -> BlockCall:
        """How the model calls a block on them, with what the blocks before it hand on; hidden states as embedded."""
        call = self._captured(block)
        return self._store.enter(0, block, call) if self._hands_on else call

    def advance(self, block: int) -> None:
        """Go through a finished block, which is resident; needed where blocks hand something on."""
        if self._hands_on:
            self._store.advance(0, block, self._captured(block), self.adapter.blocks[block])

    def _captured(self, block: int) -> BlockCall:
        embedding = self.adapter.model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(_NUM_TOKENS, device=embedding.device) % embedding.shape[0]
        return capture_calls(self.adapter.model, self.adapter.blocks, {"input_ids": ids[None]}, last=block)[-1]
