import math

import pytest
import torch
from torch import Tensor

from moeq.sampling.shortage import pick, weights, worth


def reference_pick(counts_MLE: Tensor, num: int, finished_LE: Tensor, scale: float) -> list[int]:
    """Greedy by plain loops over candidates, blocks and experts."""
    mean_LE = counts_MLE.double().mean(0) * scale
    smoothing = [1 + float((row + num * mean).mean()) / 16 for row, mean in zip(finished_LE, mean_LE, strict=True)]
    total, picked = finished_LE.tolist(), []
    for _ in range(num):

        def use(m: int, total: list[list[float]] = total) -> float:
            return sum(
                math.log(n + scale * float(counts_MLE[m, block, expert]) + smoothing[block])
                for block, row in enumerate(total)
                for expert, n in enumerate(row)
            )

        best = max(range(len(counts_MLE)), key=use)
        picked.append(best)
        total = (torch.tensor(total) + scale * counts_MLE[best]).tolist()
    return sorted(picked)


def test_picks_are_those_of_a_greedy_search_in_loops(generator: torch.Generator) -> None:
    counts_MLE = torch.randint(0, 9, (12, 3, 5), generator=generator)
    finished_LE = torch.randint(0, 40, (3, 5), generator=generator)
    for num, scale in ((1, 1.0), (5, 4.0), (12, 2.5)):
        picked = pick(counts_MLE, num, finished_LE, scale)
        assert picked.tolist() == reference_pick(counts_MLE, num, finished_LE, scale)


def test_a_candidate_that_wakes_a_starved_expert_is_picked_first() -> None:
    counts_MLE = torch.tensor([[[4, 0, 0]], [[0, 4, 0]], [[3, 0, 1]]])
    assert pick(counts_MLE, 1, torch.tensor([[50, 50, 0]]), 1.0).tolist() == [2]


def test_the_only_candidate_that_wakes_a_starved_expert_is_picked_again_until_others_are_shorter() -> None:
    counts_MLE = torch.tensor([[[8, 0]], [[8, 0]], [[0, 2]]])
    picked = pick(counts_MLE, 6, torch.tensor([[8, 0]]), 1.0).tolist()
    assert picked == [0, 0, 0, 2, 2, 2]


def test_even_use_weighs_one_and_a_starved_expert_at_most_seventeen() -> None:
    assert torch.equal(weights(torch.full((2, 4), 7)), torch.ones(2, 4, dtype=torch.float64))
    weights_LE = weights(torch.tensor([[0, 10**7, 10**7, 10**7]]))
    assert weights_LE[0, 0] == pytest.approx(17, rel=1e-4)
    assert (weights_LE[0, 1:] < 1).all()


def test_weights_are_the_slope_of_the_use_of_a_set() -> None:
    counts_LE = torch.tensor([[3, 20, 7, 0]])
    smoothing = 1 + counts_LE.double().mean() / 16
    slope = torch.log((counts_LE.double() + 1e-6 + smoothing) / (counts_LE + smoothing)) / 1e-6
    assert torch.allclose(weights(counts_LE), slope * (counts_LE.double().mean() + smoothing), rtol=1e-4)


def test_worth_is_the_mean_weight_of_the_chosen_experts() -> None:
    weights_LE = torch.tensor([[3.0, 0.5], [1.0, 2.0]], dtype=torch.float64)
    counts_NLE = torch.tensor([[[2, 0], [1, 1]], [[0, 2], [0, 2]]])
    assert worth(counts_NLE, weights_LE).tolist() == [(3 + 3 + 1 + 2) / 4, (0.5 + 0.5 + 2 + 2) / 4]
