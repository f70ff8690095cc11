"""Windows of tokens: of a running text, of random places in random rows, and of one text that is scored as a whole.

Consecutive windows of L tokens are ``ids[i * L : (i + 1) * L]``; a rest shorter than a window is left out, as in the
GPTQ papers' WikiText protocol.  Random windows follow those papers' protocol for C4 (``get_c4`` of the GPTQ code).

Shapes: T tokens of the running text, N windows, L tokens per window.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

Ids = tuple[int, ...]


def spread(total: int, count: int | None) -> list[int]:
    """``count`` numbers evenly spread over 0 .. total - 1: ``floor(i * total / count)``; None, or too many, is all."""
    if count is None or count >= total:
        return list(range(total))
    return [i * total // count for i in range(count)]


def consecutive_windows(ids_T: Tensor, length: int) -> Tensor:
    """windows_NL of a running text, without what is left at its end.

    Raises:
        ValueError: The text is shorter than one window.
    """
    available = ids_T.numel() // length
    if available == 0:
        raise ValueError(
            f"the text has {ids_T.numel()} tokens, fewer than one window of {length}; "
            f"choose a window_length of at most {max(ids_T.numel(), 2)}, or a longer text"
        )
    return ids_T[: available * length].view(available, length)


def random_windows(texts: Sequence[str], encode: Callable[[str], Ids], length: int, count: int, seed: int) -> Tensor:
    """windows_NL at random places of random texts that are longer than a window.

    Args:
        texts: Texts to draw from, with equal probability.
        encode: Token ids of a text.
        length: Tokens of a window.
        count: Number of windows.
        seed: Of Python's random numbers; the draws are those of the GPTQ code.

    Raises:
        ValueError: No text is longer than a window.
    """
    random = Random(seed)
    windows: list[Ids] = []
    too_short: set[int] = set()
    while len(windows) < count:
        number = random.randint(0, len(texts) - 1)
        ids = () if number in too_short else encode(texts[number])
        if len(ids) > length:
            start = random.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
            continue
        too_short.add(number)
        if len(too_short) == len(texts):
            raise ValueError(
                f"none of the {len(texts)} texts is longer than a window of {length} tokens; "
                "choose a shorter window, or other texts"
            )
    return torch.tensor(windows, dtype=torch.int64)


def rolling_windows(ids: Ids, prefix: int, max_length: int) -> list[tuple[Ids, Ids]]:
    """(context, continuation) pairs whose continuations are all of a text, each token once.

    The first window predicts ``max_length`` tokens after the prefix token; each later one as many after one token of
    context, and the last, shorter one after as much context as the model's window holds.
    """
    pairs: list[tuple[Ids, Ids]] = [((prefix,), ids[:max_length])] if ids else []
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        pairs.append((ids[end - max_length - 1 : start], ids[start:end]))
    return pairs
