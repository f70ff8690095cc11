"""Rows of a KV cache: reordered, repeated and dropped by one index."""

from typing import Any

from torch import Tensor


def reorder_cache(cache: Any, index_N: Tensor) -> None:
    """Row n of every layer becomes old row ``index_N[n]``; rows may repeat."""
    cache.reorder_cache(index_N)
    # MiniMaxCache inherits reorder_cache, which knows nothing of its linear-attention states (transformers 5.17, 5.23).
    if getattr(cache, "linear_cache", None) is not None:
        cache.linear_cache = [
            state if isinstance(state, list) else state.index_select(0, index_N) for state in cache.linear_cache
        ]
