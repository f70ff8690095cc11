from itertools import combinations

import pytest

from moeq.programs.passk import pass_at_k


def reference_pass_at_k(n: int, c: int, k: int) -> float:
    """Share of the k-subsets of n samples, the first c of which passed, that hold one that passed."""
    subsets = list(combinations(range(n), k))
    return sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_estimate_is_the_share_of_subsets_with_a_sample_that_passes(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(reference_pass_at_k(n, c, k), abs=1e-12)


def test_pass_at_1_is_the_share_of_samples_that_passed() -> None:
    assert pass_at_k(200, 37, 1) == pytest.approx(37 / 200)


def test_large_counts_neither_overflow_nor_leave_the_unit_interval() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    assert 0.0 < pass_at_k(100_000, 3, 2) < 1e-4
    assert pass_at_k(100_000, 50_000, 10_000) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (5, 6, 1, r"passed \(6\) must be from 0 to the samples run \(5\)"),
        (5, -1, 1, r"passed \(-1\) must be from 0"),
        (5, 2, 6, r"k \(6\) of pass@k must be from 1 to the samples of a problem \(5\)"),
        (5, 2, 0, r"k \(0\) of pass@k must be from 1"),
    ],
)
def test_impossible_counts_are_refused(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)
