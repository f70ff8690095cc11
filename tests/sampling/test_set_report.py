import pytest
import torch

from moeq.models.adapter import is_experts_module
from moeq.sampling.ebss_spec import Sampled
from moeq.sampling.effective import ExpertEvidence, measure_evidence
from moeq.sampling.next_token import score_sequences
from moeq.sampling.set_report import decision_columns, decision_steps, distinct_ngrams, set_columns, set_scalars
from tests.tiny import tiny_model

IDS = torch.arange(96).view(4, 24) % 50 + 3


def test_effective_samples_are_those_of_the_affinities_of_each_expert() -> None:
    model = tiny_model("qwen2_moe")
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    modules = [module for module in model.modules() if is_experts_module(module)]
    hooks = [m.register_forward_pre_hook(lambda _, args: routed.append((args[1], args[2]))) for m in modules]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    effective_LE = measure_evidence(model, IDS, batch_size=3).effective_LE()
    for block, (ids_TK, weights_TK) in enumerate(routed):
        for expert in range(8):
            affinity = weights_TK[ids_TK == expert].double()
            expected = float(affinity.sum() ** 2 / affinity.square().sum()) if len(affinity) else 0.0
            assert float(effective_LE[block, expert]) == pytest.approx(expected, rel=1e-4)


def test_evidence_of_parts_adds_up() -> None:
    model = tiny_model("olmoe")
    parts = [measure_evidence(model, part) for part in IDS.split(2)]
    whole = measure_evidence(model, IDS)
    assert torch.allclose((parts[0] + parts[1]).effective_LE(), whole.effective_LE(), rtol=1e-5)


def test_distinct_ngrams_are_counted_within_sequences() -> None:
    ids_NT = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]])
    for n in (1, 2, 3, 4):
        grams = [tuple(row[i : i + n]) for row in ids_NT.tolist() for i in range(len(row) - n + 1)]
        assert distinct_ngrams(ids_NT, n) == len(set(grams)) / len(grams)
    assert distinct_ngrams(ids_NT, 6) == 0.0


def test_columns_hold_lists_by_expert_and_their_least() -> None:
    model = tiny_model("qwen2_moe")
    nll_N, counts_NLE = score_sequences(model, IDS)
    sampled = Sampled(IDS, nll_N, counts_NLE, torch.zeros(4, 0, 3), torch.zeros(4, dtype=torch.int32))
    columns = set_columns(sampled, measure_evidence(model, IDS), lambda ids_NT: ["a b"] * len(ids_NT))
    assert torch.equal(torch.tensor(columns["tokens_per_expert"]), counts_NLE.sum(0))
    least = min(min(row) for row in columns["effective_samples_per_expert"])
    assert columns["effective_samples_per_expert_min"] == pytest.approx(least, abs=0.06)
    assert columns["effective_samples_per_expert_min"] <= columns["tokens_per_expert_min"]
    assert {f"distinct_{n}_grams" for n in (1, 2, 3, 4)} < columns.keys()
    logged = set_scalars(columns, "ebss_sampled")
    assert logged["ebss_sampled/tokens"] == 96.0
    assert all(isinstance(value, float) for value in logged.values())


def test_an_expert_without_tokens_has_no_effective_samples() -> None:
    zero = torch.zeros(1, 2, dtype=torch.float64)
    assert ExpertEvidence(zero, zero).effective_LE().tolist() == [[0.0, 0.0]]


def test_decisions_are_means_and_redrawn_sequences_a_sum() -> None:
    decisions_NS3 = torch.tensor([[[0.1, 2.0, 1.0], [0.3, 0.0, 0.0]], [[0.4, 3.0, 0.0], [0.4, 3.0, 0.0]]])
    columns = decision_columns(decisions_NS3, torch.tensor([2, 1]))
    assert columns["balance_term_range"] == pytest.approx(0.3)
    assert columns["likelihood_term_range"] == pytest.approx(2.0)
    assert (columns["steps_changed_by_balance"], columns["redrawn_sequences"]) == (0.25, 3.0)
    steps = decision_steps(decisions_NS3)
    assert [step["likelihood_term_range"] for step in steps] == [2.5, 1.5]
    assert [step["steps_changed_by_balance"] for step in steps] == [0.5, 0.0]
    assert decision_columns(decisions_NS3[:, :0], torch.tensor([0, 0]))["balance_term_range"] == 0
