import pytest
import torch

from moeq.tasks.text import spread_windows


def test_windows_are_consecutive_and_the_rest_is_dropped() -> None:
    windows_NL = spread_windows(torch.arange(11), 3, None)
    assert windows_NL.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_fewer_windows_are_spread_evenly_from_the_first() -> None:
    windows_NL = spread_windows(torch.arange(100), 2, 4)
    assert windows_NL[:, 0].tolist() == [0, 24, 50, 74]


def test_a_short_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 5 tokens, fewer than one window of 8"):
        spread_windows(torch.arange(5), 8, None)
    with pytest.raises(ValueError, match=r"num_windows \(4\) exceeds the 3 windows"):
        spread_windows(torch.arange(25), 8, 4)
