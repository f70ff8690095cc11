"""Where leaves and their moments are while other blocks compute: in memory, or waiting like hidden states do.

A model that is in memory keeps those of all blocks where it computes.  Of one that is streamed, a block's leaves are
made of its finished block file each time that it comes, and what they have learned waits in memory up to a bound and
beyond it on the disk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.tuning.adam import Moments, no_moments
from moeq.tuning.leaves import BlockLeaves

_PARTS = ("value", "first", "second", "steps_E")


class LeafKeeper:
    """Leaves of all blocks and their moments.

    Args:
        make: Leaves of a block, which is resident, as they begin.
        waiting: Where they wait; None keeps all of them.
    """

    def __init__(self, make: Callable[[int], BlockLeaves], waiting: WaitingStates | None) -> None:
        self._make, self._waiting = make, waiting
        self._kept: dict[int, BlockLeaves] = {}
        self._moments: dict[tuple[int, str], Moments] = {}

    def leaves(self, block: int) -> BlockLeaves:
        """Leaves of a block as they are now."""
        if block in self._kept:
            return self._kept[block]
        leaves = self._make(block)
        if self._waiting is None:
            self._kept[block] = leaves
            return leaves
        for key, leaf in leaves.leaves.items():
            if (block, key, "value") in self._waiting:
                leaf.value.data = self._waiting.read((block, key, "value"), leaf.value.device).clone()
        return leaves

    def moments(self, block: int, key: str, value: Tensor) -> Moments:
        """Moments of a leaf."""
        if self._waiting is None:
            if (block, key) not in self._moments:
                self._moments[block, key] = no_moments(value)
            return self._moments[block, key]
        if (block, key, "first") not in self._waiting:
            return no_moments(value)
        parts = {part: self._waiting.take((block, key, part), value.device) for part in _PARTS[1:]}
        return Moments(**parts)

    @torch.no_grad()
    def keep(self, block: int, key: str, value: Tensor, moments: Moments) -> None:
        """What a step made of a leaf."""
        if self._waiting is not None:
            for part, tensor in zip(_PARTS, (value, moments.first, moments.second, moments.steps_E), strict=True):
                self._waiting.put((block, key, part), tensor.detach())
