import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeq.checkpoint.loading import load_model
from moeq.sampling.balance import imbalance
from moeq.sampling.corpus import search_corpus, systematic
from moeq.sampling.ebss import draw_first_tokens, search
from moeq.sampling.ebss_spec import EBSSSpec, Sampled
from moeq.sampling.next_token import ModelNextToken
from tests.sampling.tables import TableNextToken
from tests.sampling.test_ebss import exact_distribution

REFERENCE_MODEL = Path(__file__).resolve().parents[2] / "assets/reference-moe"
ZERO = torch.zeros((), dtype=torch.int64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(spec: EBSSSpec, num: int, table: TableNextToken, seed: int = 0, pool: int = 24) -> Sampled:
    return search_corpus(table, spec, num, torch.arange(pool), seeded(seed), ZERO)


SPEC = EBSSSpec(length=32, branches=4, mode="corpus", prefix_length=3, segment=5, tau=0.3)


def test_likelihood_and_counts_belong_to_the_returned_sequences() -> None:
    table = TableNextToken(24, seeded(1))
    sampled = run(SPEC, 6, table)
    assert sampled.ids_NT.shape == (6, 32)
    assert torch.equal(sampled.counts_NLE, table.count(sampled.ids_NT))
    assert torch.allclose(sampled.nll_N.double(), -table.log_likelihood(sampled.ids_NT), atol=1e-4)


def test_the_set_is_more_even_than_without_balance() -> None:
    sigma = {}
    for balance in (True, False):
        sampled = run(replace(SPEC, balance=balance), 6, TableNextToken(24, seeded(4)), seed=1)
        sigma[balance] = float(imbalance(sampled.counts_NLE.sum(0), 6 * 32))
    assert sigma[True] < 0.8 * sigma[False]


def test_finished_sequences_turn_the_next_ones_toward_what_they_lack() -> None:
    finished_LE = torch.tensor([[500, 500, 500, 0], [500, 500, 0, 500]])
    sampled = search_corpus(TableNextToken(24, seeded(4)), SPEC, 4, torch.arange(24), seeded(), finished_LE)
    plain = run(SPEC, 4, TableNextToken(24, seeded(4)))
    lacked = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]])
    assert (sampled.counts_NLE * lacked).sum() > 1.5 * (plain.counts_NLE * lacked).sum()


def test_without_balance_corpus_mode_samples_exactly() -> None:
    """Chi-square of 4000 sequences of 4 tokens over all 27 continuations: 26 degrees of freedom."""
    table, num = TableNextToken(3, seeded(5)), 4000
    spec = EBSSSpec(length=4, branches=2, prefix_length=2, mode="corpus", segment=1, balance=False, temperature=0.8)
    first_M = torch.ones(num, dtype=torch.int64)
    sampled = search_corpus(table, spec, num, first_M, seeded(2), ZERO)
    observed = dict.fromkeys(itertools.product((1,), range(3), range(3), range(3)), 0)
    for ids in sampled.ids_NT.tolist():
        observed[tuple(ids)] += 1
    expected = exact_distribution(table, 1, 4, 0.8)
    assert sum((observed[ids] - num * p) ** 2 / (num * p) for ids, p in expected.items()) < 54.1  # 1 in 1000 seeds


def test_the_seed_decides_everything() -> None:
    first, again, other = (run(SPEC, 4, TableNextToken(24, seeded(4)), seed).ids_NT for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_systematic_draws_are_as_frequent_as_their_probabilities() -> None:
    probability_W = torch.tensor([0.05, 0.4, 0.3, 0.25], dtype=torch.float64)
    uniform_N1 = torch.rand(4000, 1, generator=seeded(), dtype=torch.float64)
    drawn_NW = systematic(probability_W.expand(4000, -1), uniform_N1)
    assert (drawn_NW.diff(dim=1) >= 0).all()
    counts_NW = torch.stack([(drawn_NW == w).sum(1) for w in range(4)], 1)
    assert ((counts_NW - 4 * probability_W).abs() < 1).all()
    assert torch.allclose(counts_NW.double().mean(0), 4 * probability_W, atol=0.03)
    even_NW = systematic(torch.full((5, 4), 0.25, dtype=torch.float64), uniform_N1[:5])
    assert torch.equal(even_NW, torch.arange(4).expand(5, -1))


def test_decisions_are_zero_where_no_branch_was_replaced() -> None:
    sampled = run(replace(SPEC, balance=False), 4, TableNextToken(24, seeded(4)))
    assert sampled.decisions_NS3[..., [0, 2]].abs().max() == 0
    steered = run(SPEC, 4, TableNextToken(24, seeded(4)))
    assert (steered.decisions_NS3.mean(1) > 0).all()


def test_the_least_covered_expert_of_the_reference_model_gets_several_times_the_tokens() -> None:
    """16 x 64 tokens against plain sampling."""
    model = load_model(str(REFERENCE_MODEL), "float32")
    counts = {}
    for mode, branches in (("corpus", 4), ("stochastic", 1)):
        spec = EBSSSpec(length=64, branches=branches, mode=mode)
        first_M = draw_first_tokens(torch.arange(1, 4096), 128 if mode == "corpus" else 16, seeded())
        with ModelNextToken(model) as next_token:
            if mode == "corpus":
                sampled = search_corpus(next_token, spec, 16, first_M, seeded(), ZERO)
            else:
                sampled = search(next_token, spec, first_M, seeded())
        counts[mode] = sampled.counts_NLE.sum(0)
    assert counts["corpus"].min() >= max(8, 2 * int(counts["stochastic"].min()))
    assert imbalance(counts["corpus"], 1024) < 0.6 * imbalance(counts["stochastic"], 1024)


@pytest.mark.parametrize("branches", [1, 3])
def test_a_last_short_segment_ends_at_the_length(branches: int) -> None:
    spec = replace(SPEC, length=12, segment=4, branches=branches)
    assert run(spec, 3, TableNextToken(24, seeded())).ids_NT.shape == (3, 12)


def test_more_branches_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"branches \(30\) must not exceed the vocabulary \(24\)"):
        run(replace(SPEC, branches=30), 2, TableNextToken(24, seeded()))
