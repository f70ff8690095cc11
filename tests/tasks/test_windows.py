"""Windows of tokens against the protocols that they follow."""

import random

import pytest
import torch

from moeq.tasks.windows import consecutive_windows, random_windows, rolling_windows, spread


def encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def reference_random_windows(texts: list[str], length: int, count: int, seed: int) -> list[list[int]]:
    """The loop of the GPTQ code's ``get_c4`` for its validation windows."""
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            ids = encode(texts[random.randint(0, len(texts) - 1)])
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        windows.append(list(ids[start : start + length]))
    return windows


@pytest.mark.parametrize("seed", [0, 1])
def test_random_windows_follow_the_gptq_code(seed: int) -> None:
    texts = ["abc" * n for n in range(12)]
    windows_NL = random_windows(texts, encode, 15, 40, seed)
    assert windows_NL.tolist() == reference_random_windows(texts, 15, 40, seed)


def test_random_windows_need_a_text_that_is_longer() -> None:
    with pytest.raises(ValueError, match="none of the 2 texts is longer than a window of 3 tokens"):
        random_windows(["abc", "d"], encode, 3, 1, 0)


def test_the_rest_of_a_text_is_left_out() -> None:
    assert consecutive_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="the text has 3 tokens, fewer than one window of 4"):
        consecutive_windows(torch.arange(3), 4)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 6, 10, 11, 13])
def test_rolling_windows_predict_every_token_once_and_fit(length: int, num_tokens: int) -> None:
    ids = tuple(range(100, 100 + num_tokens))
    pairs = rolling_windows(ids, 7, length)
    assert tuple(token for _, continuation in pairs for token in continuation) == ids
    text, end = (7, *ids), 1
    for context, continuation in pairs:
        end += len(continuation)
        assert text[:end][-len(context + continuation) :] == context + continuation
        assert len(context + continuation) <= length + 1


def test_numbers_are_evenly_spread() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, None) == spread(3, 3) == spread(3, 9) == [0, 1, 2]
