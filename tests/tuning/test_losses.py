"""Losses and the gradients that are written down for them, against slow references and against autograd."""

import math

import pytest
import torch
from torch import Tensor

from moeq.tuning.losses import hidden_error, kl_and_gradient, top_k_and_gradient


def logits(seed: int) -> Tensor:
    return 3.0 * torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))


def reference_divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def reference_top_k(original_NV: Tensor, logits_NV: Tensor, k: int) -> float:
    """Token by token: the k likeliest, and what is left of both distributions."""
    total = 0.0
    for original_V, logits_V in zip(original_NV.double(), logits_NV.double(), strict=True):
        p, q = original_V.softmax(-1).tolist(), logits_V.softmax(-1).tolist()
        top = sorted(range(len(p)), key=lambda token: -p[token])[:k]
        rest = [token for token in range(len(p)) if token not in top]
        merged = [[each[token] for token in top] + [sum(each[token] for token in rest)] for each in (p, q)]
        total += reference_divergence(*merged)
    return total


def reference_top_k_in_torch(original_NV: Tensor, logits_NV: Tensor, k: int) -> Tensor:
    """The same, differentiable."""
    top_NK = original_NV.topk(k).indices
    p_NK, q_NK = original_NV.softmax(-1).gather(1, top_NK), logits_NV.softmax(-1).gather(1, top_NK)
    p_N, q_N = 1 - p_NK.sum(1), 1 - q_NK.sum(1)
    return (p_NK * (p_NK / q_NK).log()).sum() + (p_N * (p_N / q_N).log()).sum()


def test_kl_is_that_of_a_loop_and_its_gradient_that_of_autograd() -> None:
    original_NV, logits_NV = logits(0), logits(1)
    total, gradient_NV = kl_and_gradient(original_NV, logits_NV)
    rows = zip(original_NV.double().softmax(-1).tolist(), logits_NV.double().softmax(-1).tolist(), strict=True)
    assert float(total) == pytest.approx(sum(reference_divergence(p, q) for p, q in rows), rel=1e-5)
    leaf = logits_NV.clone().requires_grad_()
    torch.nn.functional.kl_div(leaf.log_softmax(-1), original_NV.softmax(-1), reduction="sum").backward()
    torch.testing.assert_close(gradient_NV, leaf.grad)


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_is_that_of_a_loop_and_its_gradient_that_of_autograd(k: int) -> None:
    original_NV, logits_NV = logits(2), logits(3)
    total, gradient_NV = top_k_and_gradient(original_NV, logits_NV, k)
    assert float(total) == pytest.approx(reference_top_k(original_NV, logits_NV, k), rel=1e-5)
    leaf = logits_NV.clone().requires_grad_()
    reference_top_k_in_torch(original_NV, leaf, k).backward()
    torch.testing.assert_close(gradient_NV, leaf.grad, rtol=1e-4, atol=1e-6)


def test_top_k_of_the_whole_vocabulary_is_the_divergence() -> None:
    original_NV, logits_NV = logits(4), logits(5)
    whole, gradient_NV = top_k_and_gradient(original_NV, logits_NV, 99)
    total, expected_NV = kl_and_gradient(original_NV, logits_NV)
    assert float(whole) == pytest.approx(float(total), rel=1e-5)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-4, atol=1e-5)


def test_hidden_error_is_relative_to_each_token() -> None:
    original_ND, hidden_ND = logits(6), logits(7)
    original_ND[0] *= 100.0
    expected = 0.0
    for found, wanted in zip(hidden_ND.tolist(), original_ND.tolist(), strict=True):
        expected += sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) / sum(b * b for b in wanted)
    assert float(hidden_error(hidden_ND, original_ND)) == pytest.approx(expected, rel=1e-5)
