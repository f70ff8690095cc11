"""Negative log-likelihood against a loop over tokens in float64."""

import math

import pytest
import torch
from torch import Tensor

from moeq.scoring import perplexity
from moeq.scoring.perplexity import nll_sum_and_count


def reference_nll(logits_BLV: Tensor, input_ids_BL: Tensor) -> tuple[float, int]:
    """One token at a time: log of the sum of exponentials minus the target's logit, in float64."""
    total, count = 0.0, 0
    for row in range(input_ids_BL.shape[0]):
        for position in range(1, input_ids_BL.shape[1]):
            logits = [float(x) for x in logits_BLV[row, position - 1]]
            top = max(logits)
            log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
            total += log_sum - logits[int(input_ids_BL[row, position])]
            count += 1
    return total, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_sum_equals_a_loop_over_tokens(
    dtype: torch.dtype, chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", chunk)
    logits_BLV = (torch.randn(2, 9, 13, generator=generator) * 5).to(dtype)
    input_ids_BL = torch.randint(0, 13, (2, 9), generator=generator)
    nll_sum, num_tokens = nll_sum_and_count(logits_BLV, input_ids_BL)
    expected, count = reference_nll(logits_BLV, input_ids_BL)
    assert nll_sum.dtype == torch.float64
    assert int(num_tokens) == count == 16
    assert float(nll_sum) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(generator: torch.Generator) -> None:
    input_ids_BL = torch.randint(0, 50, (3, 8), generator=generator)
    nll_sum, num_tokens = nll_sum_and_count(torch.full((3, 8, 50), 2.5), input_ids_BL)
    assert math.exp(float(nll_sum) / int(num_tokens)) == pytest.approx(50, rel=1e-6)


def test_masked_targets_are_not_scored(generator: torch.Generator) -> None:
    logits_BLV = torch.randn(1, 6, 7, generator=generator)
    input_ids_BL = torch.randint(0, 7, (1, 6), generator=generator)
    mask_BL = torch.tensor([[1, 1, 1, 1, 0, 0]])
    masked = nll_sum_and_count(logits_BLV, input_ids_BL, mask_BL)
    shorter = nll_sum_and_count(logits_BLV[:, :4], input_ids_BL[:, :4])
    assert int(masked[1]) == int(shorter[1]) == 3
    torch.testing.assert_close(masked[0], shorter[0])


def test_unlikely_target_gives_a_finite_number() -> None:
    logits_BLV = torch.zeros(1, 2, 4)
    logits_BLV[0, 0, 0] = 200.0  # exp(-200) is zero in float32: softmax followed by log would give infinity
    nll_sum, _ = nll_sum_and_count(logits_BLV, torch.tensor([[0, 1]]))
    assert float(nll_sum) == pytest.approx(200.0)
