"""Calibration windows of any text.

Windows are drawn over the whole text by a seed.  They do not overlap where the text is long enough: of T tokens, N
windows of L take the starts i * L plus the i-th of N sorted random numbers in [0, T - N * L].  A shorter text gives
distinct windows that overlap.  (QuantMoE-Bench cuts 512 overlapping windows out of about 1000 lines, unseeded.)

Legend: T tokens of the text, N windows, L tokens per window.
"""

import torch
from torch import Tensor


def text_windows(ids_T: Tensor, length: int, num_windows: int, seed: int) -> Tensor:
    """int64 windows_NL in the order of the text.

    Raises:
        ValueError: The text is shorter than a window, or too short for that many distinct windows.
    """
    num_tokens = ids_T.numel()
    if num_tokens < length:
        raise ValueError(
            f"the text has {num_tokens} tokens, fewer than one window of length {length}; give a longer text or "
            f"choose a length of at most {num_tokens}"
        )
    generator = torch.Generator().manual_seed(seed)
    spare = num_tokens - num_windows * length
    if spare >= 0:
        offsets_N = torch.randint(spare + 1, (num_windows,), generator=generator).sort().values
        starts_N = offsets_N + torch.arange(num_windows) * length
    else:
        positions = num_tokens - length + 1
        if num_windows > positions:
            raise ValueError(
                f"num_windows ({num_windows}) exceeds the {positions} distinct windows of {length} tokens in a text of "
                f"{num_tokens} tokens; give a longer text or choose at most {positions}"
            )
        starts_N = torch.randperm(positions, generator=generator)[:num_windows].sort().values
    return ids_T[starts_N.unsqueeze(1) + torch.arange(length)]
