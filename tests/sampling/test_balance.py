import math
import random

import pytest
import torch
from torch import Tensor

from moeq.sampling.balance import balance_columns, degenerate_share, imbalance, zlib_ratio


def reference_imbalance(counts_LE: Tensor, num_tokens: int, units: str) -> float:
    sigmas = []
    for counts_E in counts_LE.tolist():
        divisor = num_tokens if units == "token_fraction" else sum(counts_E)
        usage = [count / divisor for count in counts_E]
        mean = sum(usage) / len(usage)
        sigmas.append(math.sqrt(sum((u - mean) ** 2 for u in usage) / (len(usage) - 1)))
    return sum(sigmas) / len(sigmas)


@pytest.mark.parametrize("units", ["token_fraction", "slot_share"])
def test_imbalance_is_the_mean_sample_deviation_of_equations_3_and_4(units: str, generator: torch.Generator) -> None:
    counts_NLE = torch.randint(0, 50, (3, 4, 6), generator=generator)
    sigma_N = imbalance(counts_NLE, 100, units)
    for counts_LE, sigma in zip(counts_NLE, sigma_N, strict=True):
        assert float(sigma) == pytest.approx(reference_imbalance(counts_LE, 100, units), rel=1e-5)


def test_the_two_units_differ_by_the_number_of_experts_per_token() -> None:
    counts_LE = torch.tensor([[30, 10, 15, 25], [20, 20, 0, 40]])  # 40 tokens, 2 experts each
    assert float(imbalance(counts_LE, 40)) == pytest.approx(2 * float(imbalance(counts_LE, 40, "slot_share")))


def test_equal_usage_has_no_imbalance() -> None:
    assert float(imbalance(torch.full((2, 8), 5), 20)) == 0.0


def test_a_loop_is_degenerate_and_varied_text_is_not() -> None:
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=400)
    loop, varied = "the the " * 50, "".join(letters)
    assert zlib_ratio(loop) < 0.2 < zlib_ratio(varied)
    assert zlib_ratio("") == 0.0
    assert degenerate_share([loop, varied, varied, ""]) == 0.5


def test_columns_are_of_the_whole_set() -> None:
    # Each sequence is lopsided, the two together are not.
    counts_NLE = torch.tensor([[[4, 0]], [[0, 4]]])
    columns = balance_columns(counts_NLE, torch.tensor([3.0, 9.0]), 4, ["a", "b"])
    assert columns["sigma_token_fraction"] == 0.0
    assert columns["sigma_token_fraction_per_sequence"] == pytest.approx(math.sqrt(0.5))
    assert (columns["tokens"], columns["tokens_per_expert_min"], columns["tokens_per_expert_mean"]) == (8.0, 4.0, 4.0)
    assert columns["nll_mean"] == pytest.approx(2.0)
    assert columns["experts_never_used"] == 0.0
