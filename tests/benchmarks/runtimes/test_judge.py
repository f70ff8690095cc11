"""Divergences of runtimes against sums written out, and where the bound lies."""

import math

import pytest
import torch

from benchmarks.runtimes.judge import Agreement, agreement, bound, judge


def test_divergence_is_the_sum_over_the_vocabulary_of_all_positions_but_the_last() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 4, 5, generator=generator).log_softmax(-1) for _ in range(2))
    divergences, same = [], []
    for window in range(2):
        for position in range(3):
            p, q = ours[window, position].tolist(), theirs[window, position].tolist()
            divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
    found = agreement(ours, theirs)
    assert found.kl == pytest.approx(sum(divergences) / 6, rel=1e-5)
    assert found.worst == pytest.approx(max(divergences), rel=1e-5)
    assert found.top1 == pytest.approx(sum(same) / 6)


def test_a_runtime_may_give_the_first_windows_alone() -> None:
    ours = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert agreement(ours, ours[:1]) == Agreement(kl=0.0, top1=1.0, worst=0.0)


@pytest.mark.parametrize(
    ("theirs", "message"), [(torch.zeros(2, 4, 6), "gave .* 6"), (torch.full((2, 4, 5), torch.nan), "not finite")]
)
def test_what_cannot_be_compared_is_an_error(theirs: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreement(torch.zeros(2, 4, 5), theirs)


def test_the_largest_noise_decides() -> None:
    largest = bound([1e-4, 2e-4])
    assert largest == pytest.approx(6e-4 + 1e-6)
    assert judge(Agreement(kl=6e-4, top1=1.0, worst=0.1), largest) == "right"
    assert judge(Agreement(kl=6.1e-4, top1=1.0, worst=0.1), largest) == "wrong"
    assert judge(Agreement(kl=2e-6, top1=1.0, worst=0.1), bound([0.0])) == "wrong"
