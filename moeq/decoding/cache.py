"""A key-value (KV) cache that grows in place and, when branches are reordered, copies only what they do not share.

The cache of transformers concatenates all keys and values at every step, and copies all of them again when rows are
reordered: 4 passes over R H T D numbers per tensor and step, to add R H D of them.  Here a step writes its own
position into a store with room for more (a multiple of ``CHUNK`` positions), and a reordering copies positions
``common[n, parent[n]]`` to T of the rows n that change, where

    common[n, m] = leading positions in which rows n and m hold the same numbers
    common'[n, m] = common[parent[n], parent[m]]      common[n, n] = T

so a branch that takes over from a sister costs the tokens since they parted, not the whole sequence.

Only layers that are exactly the plain growing layer of transformers are replaced; sliding-window, linear-attention and
indexed layers stay the model's own, beside the others in one cache, and a cache that is not exactly ``DynamicCache``
(MiniMax, hybrids with a class of their own) stays untouched.

Legend: R rows, H key-value heads, T positions held, C positions of the store, D head size, P copied positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

CHUNK = 64
# Attribute of the keys and values that ``GrowingLayer`` returns: the store of which they are the first T positions.
STORE = "moeq_store"


class GrowingLayer(DynamicLayer):
    """Keys and values as the first T positions of [R, H, C, D] stores whose remaining positions are finite.

    Args:
        keys_RHTD: What the layer holds at the beginning; copied.
        values_RHTD: Likewise; its heads may have another size.
    """

    def __init__(self, keys_RHTD: Tensor, values_RHTD: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys_RHTD, values_RHTD)
        self._keys_RHCD, self._values_RHCD = _with_room(keys_RHTD), _with_room(values_RHTD)
        self._show(keys_RHTD.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns views of all that is held."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if stop > self._keys_RHCD.shape[-2]:
            self._keys_RHCD = _with_room(self._keys_RHCD[..., :start, :], stop)
            self._values_RHCD = _with_room(self._values_RHCD[..., :start, :], stop)
        self._keys_RHCD[..., start:stop, :] = key_states
        self._values_RHCD[..., start:stop, :] = value_states
        self._show(stop)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n becomes old row ``beam_idx[n]``, copied whole; the number of rows may change."""
        index_N = beam_idx.to(self._keys_RHCD.device)
        self._keys_RHCD = self._keys_RHCD.index_select(0, index_N)
        self._values_RHCD = self._values_RHCD.index_select(0, index_N)
        self._show(self.get_seq_length())

    def copy_positions(self, to_P: Tensor, from_P: Tensor, position_P: Tensor) -> None:
        """Position ``position_P[p]`` of row ``to_P[p]`` becomes that of old row ``from_P[p]``."""
        for store_RHCD in (self._keys_RHCD, self._values_RHCD):
            # The right side is gathered before anything is written, so rows may change places.
            store_RHCD[to_P, :, position_P] = store_RHCD[from_P, :, position_P]

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys_RHCD[..., :length, :], self._values_RHCD[..., :length, :]
        setattr(self.keys, STORE, self._keys_RHCD)
        setattr(self.values, STORE, self._values_RHCD)


class GrowingCache(DynamicCache):
    """A cache whose plain layers are ``GrowingLayer``; the others are those of ``cache``.

    Args:
        cache: A ``DynamicCache`` that holds a prefill.
        num_rows: Its rows.
    """

    def __init__(self, cache: DynamicCache, num_rows: int) -> None:
        super().__init__()
        self.layers = [
            GrowingLayer(layer.keys, layer.values) if type(layer) is DynamicLayer and layer.is_initialized else layer
            for layer in cache.layers
        ]
        self.num_in_place = sum(isinstance(layer, GrowingLayer) for layer in self.layers)
        self._common_RR = torch.zeros(num_rows, num_rows, dtype=torch.int64)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n becomes old row ``beam_idx[n]``; rows may repeat, and their number may change."""
        parent_N = beam_idx.cpu()
        grown = [layer for layer in self.layers if isinstance(layer, GrowingLayer)]
        length = grown[0].get_seq_length() if grown else 0
        self._common_RR.fill_diagonal_(length)
        row_N, same_rows = torch.arange(len(parent_N)), len(parent_N) == len(self._common_RR)
        start_N = self._common_RR[row_N, parent_N] if same_rows else torch.zeros_like(parent_N)
        self._common_RR = self._common_RR[parent_N][:, parent_N]
        # Copying single positions costs about twice as much as copying rows.
        by_position = same_rows and 2 * int((length - start_N).sum()) <= length * len(parent_N)
        if by_position:
            moves = [index_P.to(beam_idx.device) for index_P in _spread(row_N, parent_N, start_N, length)]
        for layer in self.layers:
            if by_position and isinstance(layer, GrowingLayer):
                layer.copy_positions(*(index_P.to(layer.device) for index_P in moves))
            else:
                layer.reorder_cache(beam_idx)


def grow_in_place(cache: Any, num_rows: int) -> Any:
    """The cache of a prefill with its plain layers replaced; itself where it has none or has a class of its own."""
    if type(cache) is not DynamicCache:
        return cache
    grown = GrowingCache(cache, num_rows)
    return grown if grown.num_in_place else cache


def _with_room(held_RHTD: Tensor, length: int = 0) -> Tensor:
    rows, heads, held, size = held_RHTD.shape
    room = -(-max(length, held + 1) // CHUNK) * CHUNK
    store_RHCD = held_RHTD.new_zeros(rows, heads, room, size)
    store_RHCD[..., :held, :] = held_RHTD
    return store_RHCD


def _spread(row_N: Tensor, parent_N: Tensor, start_N: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to write, rows to read and positions, one of each for every position from ``start_N[n]`` to ``length``."""
    count_N = length - start_N
    offset_P = (start_N - count_N.cumsum(0) + count_N).repeat_interleave(count_N)
    position_P = torch.arange(int(count_N.sum())) + offset_P
    return row_N.repeat_interleave(count_N), parent_N.repeat_interleave(count_N), position_P
