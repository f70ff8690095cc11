"""Evaluation windows, consecutive and not random.

A stream of tokens is cut into non-overlapping windows of L tokens; where fewer windows than there are get evaluated,
window ``floor(i * N / n)`` for i = 0 .. n-1 spreads them evenly over the text.  Nothing here is random: the same files
and tokenizer give the same windows on every run and every rank.

Shapes: T tokens of the stream, N windows, L tokens per window.
"""

import torch
from torch import Tensor


def spread_windows(ids_T: Tensor, window_length: int, num_windows: int | None) -> Tensor:
    """Cut a stream into windows_NL, ``num_windows`` of them evenly spread over the text (None is all of them).

    Raises:
        ValueError: The stream is shorter than one window, or has fewer windows than asked for.
    """
    available = ids_T.numel() // window_length
    if available == 0:
        raise ValueError(
            f"the text has {ids_T.numel()} tokens, fewer than one window of {window_length}; "
            f"choose a window_length of at most {max(ids_T.numel(), 2)}, or a longer text"
        )
    windows_NL = ids_T[: available * window_length].view(available, window_length)
    if num_windows is None:
        return windows_NL
    if num_windows > available:
        raise ValueError(
            f"num_windows ({num_windows}) exceeds the {available} windows of {window_length} tokens in the text; "
            f"choose at most {available}, or null for all"
        )
    return windows_NL[torch.arange(num_windows) * available // num_windows]
