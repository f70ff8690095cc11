import pytest
import torch

from moeq.sampling.text import text_windows


def test_windows_do_not_overlap_and_cover_the_whole_text() -> None:
    seen = torch.zeros(1000, dtype=torch.bool)
    for seed in range(40):
        windows_NL = text_windows(torch.arange(1000), 30, 12, seed)
        assert windows_NL.shape == (12, 30)
        assert windows_NL.flatten().unique().numel() == 360
        assert (windows_NL.diff(dim=1) == 1).all()
        seen[windows_NL.flatten()] = True
    assert seen.all()


def test_a_text_that_fits_exactly_is_taken_whole() -> None:
    assert torch.equal(text_windows(torch.arange(60), 20, 3, 0).flatten(), torch.arange(60))


def test_windows_of_a_short_text_overlap_but_differ() -> None:
    windows_NL = text_windows(torch.arange(25), 20, 6, 0)
    assert windows_NL.unique(dim=0).shape == (6, 20)


def test_the_seed_chooses_the_windows() -> None:
    ids_T = torch.arange(1000)
    assert torch.equal(text_windows(ids_T, 30, 12, 3), text_windows(ids_T, 30, 12, 3))
    assert not torch.equal(text_windows(ids_T, 30, 12, 3), text_windows(ids_T, 30, 12, 4))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the text has 19 tokens, fewer than one window of length 20.*at most 19"):
        text_windows(torch.arange(19), 20, 1, 0)
    with pytest.raises(ValueError, match=r"num_windows \(7\) exceeds the 6 distinct windows of 20 tokens"):
        text_windows(torch.arange(25), 20, 7, 0)
