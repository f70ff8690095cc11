"""Calibration windows of any text.

Windows are drawn over the whole text by a seed.  They do not overlap where the text is long enough: of T tokens, N
windows of L take the starts i * L plus the i-th of N sorted random numbers in [0, T - N * L].  A shorter text gives
distinct windows that overlap, which ``overlap`` tells.  (QuantMoE-Bench cuts 512 overlapping windows out of about 1000
lines, unseeded.)

Legend: T tokens of the text, N windows, L tokens per window.
"""

import torch
from torch import Tensor


def text_windows(ids_T: Tensor, length: int, num_windows: int, seed: int) -> Tensor:
    """int64 windows_NL in the order of the text.

    Raises:
        ValueError: The text is shorter than a window, or too short for that many distinct windows.
    """
    return cut_windows(ids_T, window_starts(ids_T.numel(), length, num_windows, seed), length)


def cut_windows(ids_T: Tensor, starts_N: Tensor, length: int) -> Tensor:
    """int64 windows_NL of a text."""
    return ids_T[starts_N.unsqueeze(1) + torch.arange(length)]


def window_starts(num_tokens: int, length: int, num_windows: int, seed: int) -> Tensor:
    """int64 starts_N, sorted, of windows of a text; raises ValueError as ``text_windows``."""
    if num_tokens < length:
        raise ValueError(
            f"the text has {num_tokens} tokens, fewer than one window of length {length}; give a longer text or "
            f"choose a length of at most {num_tokens}"
        )
    generator = torch.Generator().manual_seed(seed)
    spare = num_tokens - num_windows * length
    if spare >= 0:
        offsets_N = torch.randint(spare + 1, (num_windows,), generator=generator).sort().values
        return offsets_N + torch.arange(num_windows) * length
    positions = num_tokens - length + 1
    if num_windows > positions:
        raise ValueError(
            f"num_windows ({num_windows}) exceeds the {positions} distinct windows of {length} tokens in a text of "
            f"{num_tokens} tokens; give a longer text or choose at most {positions}"
        )
    return torch.randperm(positions, generator=generator)[:num_windows].sort().values


def overlap(starts_N: Tensor, length: int, num_tokens: int) -> str | None:
    """How often windows count the same tokens, in words; None where none overlap."""
    touching, no = starts_N.diff() < length, torch.zeros(1, dtype=torch.bool)
    num_overlapping = int((torch.cat([touching, no]) | torch.cat([no, touching])).sum())
    if not num_overlapping:
        return None
    changes_T = torch.zeros(num_tokens + 1, dtype=torch.int64)
    changes_T.index_add_(0, starts_N, torch.ones_like(starts_N))
    changes_T.index_add_(0, starts_N + length, -torch.ones_like(starts_N))
    counts_T = changes_T.cumsum(0)[:-1]
    used_T = counts_T[counts_T > 0]
    asked = len(starts_N) * length
    return (
        f"{num_tokens} tokens of text for {asked} asked: {num_overlapping} of {len(starts_N)} windows overlap, and a "
        f"token counts {asked / len(used_T):.1f} times on average, {int(used_T.max())} at most, in Hessians and in "
        f"what min_tokens is compared with; give a longer text, or at most {num_tokens // length} windows"
    )
