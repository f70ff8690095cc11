import itertools

import pytest
import torch

from moeq.decoding.gumbel import tempered
from moeq.sampling.balance import imbalance
from moeq.sampling.ebss import EBSSSpec, Usage, search
from moeq.sampling.next_token import ModelNextToken
from tests.sampling.tables import TableNextToken
from tests.tiny import tiny_model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_slot_shares_decide_like_token_fractions_with_a_tau_k_times_smaller() -> None:
    ids = []
    for units, tau in (("token_fraction", 0.4), ("slot_share", 0.2)):  # two experts per token
        spec = EBSSSpec(length=12, branches=3, tau=tau, mode="paper", sigma_units=units)
        with ModelNextToken(tiny_model("qwen2_moe")) as next_token:
            ids.append(search(next_token, spec, torch.arange(5, 9), seeded()).ids_NT)
    assert torch.equal(*ids)


def reference_corpus_search(table: TableNextToken, spec: EBSSSpec, first: int, usage: Usage) -> tuple[int, ...]:
    """One sequence in slow loops; sigma is that of the finished tokens and the branch together."""

    def cost(ids: tuple[int, ...], routed: tuple[int, ...]) -> float:
        log_prob = float(table.log_likelihood(torch.tensor([ids]))[0])
        counts_LE = table.count(torch.tensor([routed]))[0] + usage.counts_LE
        return -log_prob / len(ids) + float(imbalance(counts_LE, len(routed) + usage.num_tokens)) / spec.tau

    branches = [(first,)]
    while len(branches[0]) < spec.length:
        keep = spec.branches if len(branches[0]) >= spec.prefix_length else 1
        pairs = itertools.product(branches, range(table.log_prob_VVV.shape[-1]))
        branches = [ids for _, ids in sorted((cost((*ids, v), ids), (*ids, v)) for ids, v in pairs)[:keep]]
    return min(branches, key=lambda ids: cost(ids, ids))


def test_sigma_of_the_corpus_counts_the_finished_sequences() -> None:
    usage = Usage(torch.tensor([[9, 1, 1, 1], [2, 8, 1, 1]]), 12)
    spec = EBSSSpec(length=9, branches=3, tau=0.05, prefix_length=2, mode="paper", sigma_scope="corpus")
    changed = 0
    for first in range(7):
        table = TableNextToken(7, seeded(3), sharpness=0.7)
        (ids,) = search(table, spec, torch.tensor([first]), seeded(), usage).ids_NT.tolist()
        assert tuple(ids) == reference_corpus_search(table, spec, first, usage)
        (without,) = search(table, spec, torch.tensor([first]), seeded()).ids_NT.tolist()
        changed += ids != without
    assert changed


def test_many_finished_sequences_silence_the_balance_term() -> None:
    spec = EBSSSpec(length=16, branches=3, tau=0.1, mode="paper", sigma_scope="corpus")
    few, many = (
        search(TableNextToken(9, seeded(3)), spec, torch.arange(9), seeded(), Usage(torch.full((2, 4), n), 4 * n))
        for n in (1, 10**6)
    )
    assert many.decisions_NS3[..., 0].max() < 0.01 * few.decisions_NS3[..., 0].mean()


@pytest.mark.parametrize("mode", ["paper", "stochastic"])
def test_decisions_tell_whether_the_balance_term_changed_a_step(mode: str) -> None:
    def run(**settings: object) -> torch.Tensor:
        spec = EBSSSpec(length=16, branches=3, mode=mode, **settings)
        return search(TableNextToken(9, seeded(3), sharpness=0.7), spec, torch.arange(9), seeded()).decisions_NS3

    strong, weak, off = run(tau=0.02), run(tau=1e9), run(balance=False)
    assert strong.shape == (9, 11, 3)
    assert strong[..., 2].mean() > 0.2
    assert (strong[..., :2].mean(1) > 0).all()
    assert weak[..., 0].max() < 1e-8
    assert weak[..., 2].max() == 0
    assert off.numel() == 0


def test_the_ranges_of_a_step_are_those_of_its_terms() -> None:
    """One step in which branches compete: three tokens after a prefix of one."""
    table = TableNextToken(5, seeded(1))
    spec = EBSSSpec(length=3, branches=2, tau=0.5, prefix_length=1, mode="paper")
    ((decision,),) = search(table, spec, torch.tensor([2]), seeded()).decisions_NS3.tolist()
    pairs = sorted((-float(table.log_likelihood(torch.tensor([[2, v]]))[0]), v) for v in range(5))[:2]
    sigma = [float(imbalance(table.count(torch.tensor([[2, v]]))[0], 2)) / 0.5 for _, v in pairs]
    nll = sorted(
        -float(table.log_likelihood(torch.tensor([[2, v, u]]))[0]) / 3 for _, v in pairs for u in range(5)
    )[:2]  # fmt: skip
    assert decision[0] == pytest.approx(abs(sigma[0] - sigma[1]), abs=1e-6)
    assert decision[1] == pytest.approx(nll[1] - nll[0], rel=1e-4)


def test_a_sampled_prefix_varies_and_a_greedy_one_does_not() -> None:
    for prefix, distinct in (("greedy", 1), ("sampled", 10)):
        spec = EBSSSpec(length=8, branches=2, prefix_length=4, mode="paper", prefix=prefix)
        sampled = search(TableNextToken(9, seeded(2)), spec, torch.full((64,), 3), seeded())
        prefixes = set(map(tuple, sampled.ids_NT[:, :4].tolist()))
        assert (len(prefixes) == 1) == (distinct == 1)
        assert len(prefixes) >= distinct


def test_top_p_keeps_the_smallest_likely_set_but_enough_to_branch() -> None:
    log_prob_RV = torch.tensor([[0.5, 0.1, 0.3, 0.06, 0.04], [0.96, 0.01, 0.01, 0.015, 0.005]]).log()
    kept = tempered(log_prob_RV, 1.0, 0.85, 2).exp()
    expected = torch.tensor([[0.5, 0.1, 0.3, 0, 0], [0.96, 0, 0, 0.015, 0]])
    assert torch.allclose(kept, expected / expected.sum(1, keepdim=True))
    assert tempered(log_prob_RV, 1.0, 1.0, 1) is log_prob_RV
    sharper = tempered(log_prob_RV, 0.5, 1.0, 1).exp()
    assert torch.allclose(sharper, log_prob_RV.exp() ** 2 / (log_prob_RV.exp() ** 2).sum(1, keepdim=True))


def test_a_stochastic_search_with_top_p_takes_only_kept_tokens() -> None:
    table = TableNextToken(12, seeded(4), sharpness=2.0)
    spec = EBSSSpec(length=24, branches=1, top_p=0.5, mode="stochastic")
    sampled = search(table, spec, torch.arange(12), seeded())
    allowed_VVV = tempered(table.log_prob_VVV.flatten(0, 1), 1.0, 0.5, 1).unflatten(0, (12, 12)).isfinite()
    ids_NT = sampled.ids_NT
    assert allowed_VVV[ids_NT[:, :-2], ids_NT[:, 1:-1], ids_NT[:, 2:]].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0"),
        ({"top_p": 0.9, "mode": "paper"}, r"top_p \(0.9\) must be 1 in paper mode"),
        (
            {"min_tokens_per_expert": 5.0, "mode": "stochastic"},
            r"min_tokens_per_expert \(5.0\) must be 0 in stochastic mode",
        ),
        ({"min_tokens_per_expert": -1.0, "mode": "corpus"}, r"min_tokens_per_expert \(-1.0\) must be at least 0"),
        ({"starts": 0}, r"starts \(0\) must be at least 1"),
        ({"segment": 0}, r"segment \(0\) must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EBSSSpec(**settings)


def test_the_search_of_one_sequence_refuses_corpus_mode() -> None:
    with pytest.raises(ValueError, match=r"mode \(corpus\) must be paper or stochastic"):
        search(TableNextToken(7, seeded()), EBSSSpec(mode="corpus"), torch.arange(2), seeded())
