import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.sampling.balance import imbalance
from moeq.sampling.ebss import EBSSSpec, Sampled, draw_first_tokens, search
from tests.sampling.tables import TableNextToken


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_search(table: TableNextToken, spec: EBSSSpec, first: int) -> tuple[int, ...]:
    """Equation 13 in slow loops: every extension of every branch is scored, the w cheapest are kept."""

    def cost(ids: tuple[int, ...], routed: tuple[int, ...]) -> float:
        log_prob = float(table.log_likelihood(torch.tensor([ids]))[0])
        sigma = float(imbalance(table.count(torch.tensor([routed]))[0], len(routed)))
        return -log_prob / len(ids) + (sigma / spec.tau if spec.balance else 0.0)

    vocabulary = range(table.log_prob_VVV.shape[-1])
    branches = [(first,)]
    while len(branches[0]) < spec.length:
        keep = spec.branches if len(branches[0]) >= spec.prefix_length else 1
        extensions = [(cost((*ids, v), ids), (*ids, v)) for ids, v in itertools.product(branches, vocabulary)]
        branches = [ids for _, ids in sorted(extensions)[:keep]]
    return min(branches, key=lambda ids: cost(ids, ids))


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("branches", [1, 2, 3, 5])
def test_paper_mode_returns_the_branch_of_an_exhaustive_search(branches: int, balance: bool) -> None:
    table = TableNextToken(7, seeded(branches), sharpness=0.7)
    spec = EBSSSpec(length=9, branches=branches, tau=0.3, prefix_length=2, mode="paper", balance=balance)
    sampled = search(table, spec, torch.arange(7), seeded())
    expected = [reference_search(table, spec, first) for first in range(7)]
    assert [tuple(ids) for ids in sampled.ids_NT.tolist()] == expected


def test_balance_changes_what_paper_mode_returns() -> None:
    """So that the test above means something: at its settings the imbalance term decides."""
    table = TableNextToken(7, seeded(3), sharpness=0.7)
    spec = EBSSSpec(length=9, branches=3, tau=0.3, prefix_length=2, mode="paper")
    on, off = (search(table, replace(spec, balance=balance), torch.arange(7), seeded()) for balance in (True, False))
    assert not torch.equal(on.ids_NT, off.ids_NT)


@pytest.mark.parametrize("mode", ["paper", "stochastic"])
def test_likelihood_and_counts_belong_to_the_returned_sequence(mode: str) -> None:
    table = TableNextToken(12, seeded(1))
    spec = EBSSSpec(length=20, branches=3, mode=mode)
    sampled = search(table, spec, torch.arange(12), seeded())
    assert torch.equal(sampled.ids_NT[:, 0], torch.arange(12))
    assert torch.equal(sampled.counts_NLE, table.count(sampled.ids_NT))
    assert torch.allclose(sampled.nll_N.double(), -table.log_likelihood(sampled.ids_NT), atol=1e-4)
    assert table.num_steps == 19


def exact_distribution(table: TableNextToken, first: int, length: int, temperature: float) -> dict[tuple, float]:
    log_prob_VVV = (table.log_prob_VVV.double() / temperature).log_softmax(-1)
    vocabulary = range(log_prob_VVV.shape[-1])
    distribution = {}
    for rest in itertools.product(vocabulary, repeat=length - 1):
        ids = (first, *rest)
        terms = [log_prob_VVV[ids[t - 1] if t else 0, ids[t], ids[t + 1]] for t in range(length - 1)]
        distribution[ids] = float(torch.stack(terms).sum().exp())
    return distribution


@pytest.mark.parametrize(("branches", "prefix_length", "temperature"), [(1, 1, 1.0), (3, 1, 1.0), (3, 2, 0.7)])
def test_without_balance_stochastic_mode_samples_exactly(branches: int, prefix_length: int, temperature: float) -> None:
    """Chi-square of 4000 sequences of 4 tokens over all 27 continuations: 26 degrees of freedom."""
    table = TableNextToken(3, seeded(5))
    spec = EBSSSpec(
        length=4,
        branches=branches,
        prefix_length=prefix_length,
        temperature=temperature,
        balance=False,
        mode="stochastic",
    )
    num = 4000
    sampled = search(table, spec, torch.ones(num, dtype=torch.int64), seeded(2))
    observed = dict.fromkeys(itertools.product((1,), range(3), range(3), range(3)), 0)
    for ids in sampled.ids_NT.tolist():
        observed[tuple(ids)] += 1
    expected = exact_distribution(table, 1, 4, temperature)
    chi_square = sum((observed[ids] - num * p) ** 2 / (num * p) for ids, p in expected.items())
    assert chi_square < 54.1  # exceeded once in 1000 seeds


@pytest.mark.parametrize("mode", ["paper", "stochastic"])
def test_balance_lowers_imbalance_on_average(mode: str) -> None:
    spec = EBSSSpec(length=32, branches=4, tau=0.05, mode=mode)
    sigma = {}
    for balance in (True, False):
        table = TableNextToken(24, seeded(4), sharpness=0.5)
        sampled = search(table, replace(spec, balance=balance), torch.arange(24), seeded(1))
        sigma[balance] = float(imbalance(sampled.counts_NLE, spec.length).mean())
    assert sigma[True] < 0.85 * sigma[False]


def test_sequences_do_not_depend_on_their_batch() -> None:
    spec = EBSSSpec(length=12, branches=3, mode="stochastic")
    first = torch.arange(8)
    whole = search(TableNextToken(8, seeded(6)), spec, first, seeded(9))
    generator = seeded(9)
    parts = [search(TableNextToken(8, seeded(6)), spec, part, generator) for part in first.split([3, 5])]
    assert torch.equal(whole.ids_NT, torch.cat([part.ids_NT for part in parts]))


def test_the_seed_decides_the_draws() -> None:
    spec = EBSSSpec(length=12, branches=2, mode="stochastic")

    def run(seed: int) -> Sampled:
        return search(TableNextToken(8, seeded(6)), spec, torch.arange(8), seeded(seed))

    assert torch.equal(run(1).ids_NT, run(1).ids_NT)
    assert not torch.equal(run(1).ids_NT, run(2).ids_NT)


def test_branches_of_a_sequence_are_distinct_from_their_first_step_on() -> None:
    class Watched(TableNextToken):
        def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
            result = super().step(parent_N, token_N)
            branches = self.ids_NT.unflatten(0, (5, -1))
            assert all(len(set(map(tuple, rows))) == len(rows) for rows in branches.tolist())
            return result

    for mode in ("paper", "stochastic"):
        search(
            Watched(6, seeded(), sharpness=20.0), EBSSSpec(length=10, branches=4, mode=mode), torch.arange(5), seeded()
        )


def test_first_tokens_are_distinct_candidates() -> None:
    candidates = torch.arange(10, 30)
    for seed in range(20):
        first = draw_first_tokens(candidates, 20, seeded(seed))
        assert sorted(first.tolist()) == candidates.tolist()
    with pytest.raises(ValueError, match=r"num_sequences \(21\) must not exceed the 20 tokens"):
        draw_first_tokens(candidates, 21, seeded())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sequences": 0}, r"num_sequences \(0\) must be at least 1"),
        ({"branches": 0}, r"branches \(0\) must be at least 1"),
        ({"length": 4}, r"length \(4\) must exceed prefix_length \(4\)"),
        ({"tau": 0.0}, r"tau \(0.0\) must be positive"),
        ({"tau": float("nan")}, r"tau \(nan\) must be positive"),
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be positive"),
        ({"mode": "paper", "temperature": 0.7}, r"temperature \(0.7\) must be 1 in paper mode"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EBSSSpec(**settings)


def test_more_branches_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"branches \(8\) must not exceed the vocabulary \(7\)"):
        search(
            TableNextToken(7, seeded()), EBSSSpec(length=6, branches=8, mode="stochastic"), torch.arange(2), seeded()
        )
