"""Bytes of the tensors that are alive while something runs, counted operation by operation."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations within make, until they are freed.

    Attributes:
        now: Bytes alive.
        peak: The most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_real(leaf)}
        for leaf in tree_leaves(output):
            if _is_real(leaf) and (key := leaf.untyped_storage()._cdata) not in self._sizes and key not in inputs:
                storage = leaf.untyped_storage()
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, key)
        self.peak = max(self.peak, self.now)
        return output

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"
