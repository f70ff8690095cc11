"""KL divergence and top-1 agreement against a loop over positions in float64."""

import math

import pytest
import torch
from torch import Tensor

from moeq.scoring import perplexity
from moeq.scoring.divergence import divergence_by_owner, kl_sum_and_agreement


def reference_kl(p_logits_BLV: Tensor, q_logits_BLV: Tensor) -> tuple[float, int, int]:
    """One position at a time from the definition: sum over the vocabulary of P log(P / Q)."""
    total, same, count = 0.0, 0, 0
    pairs = zip(p_logits_BLV.double().flatten(0, 1), q_logits_BLV.double().flatten(0, 1), strict=True)
    for p_logits_V, q_logits_V in pairs:
        p, q = ([math.exp(float(x)) for x in logits_V] for logits_V in (p_logits_V, q_logits_V))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
        count += 1
    return total, same, count


@pytest.mark.parametrize("chunk", [3, 512])
def test_sums_equal_a_loop_over_positions(
    chunk: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", chunk)
    p_logits_BLV = torch.randn(2, 8, 11, generator=generator) * 2
    q_logits_BLV = p_logits_BLV + torch.randn(2, 8, 11, generator=generator)
    kl_sum, num_same, num_positions = kl_sum_and_agreement(p_logits_BLV, q_logits_BLV)
    expected, same, count = reference_kl(p_logits_BLV, q_logits_BLV)
    assert float(kl_sum) == pytest.approx(expected, rel=1e-5)
    assert (int(num_same), int(num_positions)) == (same, count)
    assert 0 < same < count


def test_equal_logits_have_no_divergence_at_all(generator: torch.Generator) -> None:
    logits_BLV = torch.randn(2, 5, 30, generator=generator).to(torch.bfloat16)
    kl_sum, num_same, num_positions = kl_sum_and_agreement(logits_BLV, logits_BLV.clone())
    assert float(kl_sum) == 0.0
    assert int(num_same) == int(num_positions) == 10


def test_adding_a_constant_to_the_logits_changes_nothing(generator: torch.Generator) -> None:
    logits_BLV = torch.randn(1, 5, 30, generator=generator)
    kl_sum, num_same, _ = kl_sum_and_agreement(logits_BLV, logits_BLV + 7.0)
    assert float(kl_sum) == pytest.approx(0.0, abs=1e-5)
    assert int(num_same) == 5


def test_the_reference_comes_first(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 1, 4, 9, generator=generator) * 3
    assert float(kl_sum_and_agreement(a, b)[0]) == pytest.approx(reference_kl(a, b)[0], rel=1e-5)
    assert float(kl_sum_and_agreement(a, b)[0]) != pytest.approx(reference_kl(b, a)[0], rel=1e-2)


def test_masked_positions_do_not_count(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 1, 6, 9, generator=generator)
    masked = kl_sum_and_agreement(a, b, torch.tensor([[1, 1, 1, 0, 0, 0]]))
    for got, expected in zip(masked, kl_sum_and_agreement(a[:, :3], b[:, :3]), strict=True):
        torch.testing.assert_close(got, expected)


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 8\) must have the reference's \(1, 2, 9\)"):
        kl_sum_and_agreement(torch.zeros(1, 2, 9), torch.zeros(1, 2, 8))


def test_documents_get_the_sums_of_their_own_positions(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeq.scoring.divergence.CHUNK_TOKENS", 4)
    p_NV, q_NV = torch.randn(2, 9, 11, generator=generator)
    owner_N = torch.tensor([2, 0, 0, 2, 2, 0, 2, 3, 3])
    kl, same, count = divergence_by_owner(p_NV.to(torch.float64), q_NV, owner_N, 4)
    for owner in range(4):
        own = owner_N == owner
        expected = reference_kl(p_NV[own][None], q_NV[own][None])
        assert (float(kl[owner]), int(same[owner]), int(count[owner])) == (
            pytest.approx(expected[0], rel=1e-5),
            *expected[1:],
        )
    with pytest.raises(ValueError, match=r"\(9, 11\) must have the reference's \(8, 11\)"):
        divergence_by_owner(p_NV[:8], q_NV, owner_N, 4)
