"""Per-document divergence and agreement equal slow sums over requests that are run one at a time."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.models.experts import is_experts_module
from moeq.scoring.comparison import compare
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import Said, Scorer
from moeq.tasks.documents import Request
from moeq.tasks.task import Values
from tests.tiny import tiny_model

CONTEXTS = [(5, 6, 7, 8, 9, 10), (5, 6, 7, 8, 40, 41, 42), (5, 6)]
ENDINGS = [(1, 2, 3), (4,), (1, 9), (7,)]
REQUESTS = [Request(context, ending, open_end=i == 2) for i, context in enumerate(CONTEXTS) for ending in ENDINGS]
OWNERS = [i for i in range(3) for _ in ENDINGS]


def models(family: str) -> tuple[Any, Any]:
    original = tiny_model(family)
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return original, model


def alone(model: Any, request: Request) -> tuple[list[list[float]], list[list[set[int]]]]:
    """Probabilities after each token of one request that is compared, and the experts of each token by block."""
    row = [*request.context, *request.continuation][: None if request.open_end else -1]
    chosen: list[list[set[int]]] = []

    def record(_: Any, args: tuple[Tensor, ...]) -> None:
        chosen.append([set(ids) for ids in args[1].tolist()])

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if is_experts_module(m)]
    logits_LV = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
    for handle in handles:
        handle.remove()
    return logits_LV.softmax(-1)[len(request.context) - 1 :].tolist(), chosen


def reference_compare(original: Any, model: Any) -> dict[int, Values]:
    values: dict[int, dict[str, list[float]]] = {}
    for request, owner in zip(REQUESTS, OWNERS, strict=True):
        sums = values.setdefault(owner, {name: [0, 0] for name in ("kl", "top1_agreement", "router_agreement")})
        (all_p, chosen_p), (all_q, chosen_q) = alone(original, request), alone(model, request)
        for p, q in zip(all_p, all_q, strict=True):
            sums["kl"][0] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            sums["top1_agreement"][0] += p.index(max(p)) == q.index(max(q))
            sums["kl"][1] += 1
            sums["top1_agreement"][1] += 1
        for block_p, block_q in zip(chosen_p, chosen_q, strict=True):
            sums["router_agreement"][0] += sum(a == b for a, b in zip(block_p, block_q, strict=True))
            sums["router_agreement"][1] += len(block_p)
    return {owner: {name: (t, w) for name, (t, w) in sums.items()} for owner, sums in values.items()}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_values_by_document_equal_those_of_requests_run_alone_in_any_two_layouts(family: str) -> None:
    original, model = models(family)
    expected = reference_compare(original, model)
    layouts: list[Layout] = ["plain", "prefix", "document"]
    plans = [plan_requests(REQUESTS, OWNERS, layout) for layout in layouts]
    for reference in [Scorer(original).said(plan) for plan in plans]:
        for said in [Scorer(model).said(plan) for plan in plans]:
            values = compare(reference, said)
            assert values.keys() == expected.keys()
            for owner, entry in expected.items():
                assert values[owner].keys() == entry.keys()
                for name, pair in entry.items():
                    assert values[owner][name] == pytest.approx(pair, rel=2e-4), (owner, name)
    agreements = [entry["router_agreement"] for entry in expected.values()]
    assert any(0 < same < count for same, count in agreements)


def test_a_layout_that_does_not_work_is_replaced_and_trial_passes_are_not_recorded() -> None:
    class WithoutCache(Scorer):
        def settled(self, plan: Plan) -> Plan:
            self.model(input_ids=torch.arange(50).view(1, 50))  # a trial
            return plan_requests(plan.requests, plan.owners, "plain")

    plan = plan_requests(REQUESTS, OWNERS, "document")
    said = WithoutCache(tiny_model("mixtral")).said(plan)
    assert said.scored.plan.layout == "plain"
    assert {len(ids_TK) for ids_TK in said.routing.values()} == {said.scored.plan.num_tokens}


def test_a_model_equals_itself_whatever_the_dtype_and_order_of_the_ids() -> None:
    said = Scorer(tiny_model("mixtral", dtype=torch.bfloat16)).said(plan_requests(REQUESTS, OWNERS))
    small = Said(said.scored, {name: ids_TK.to(torch.uint8).flip(-1) for name, ids_TK in said.routing.items()})
    for entry in compare(small, said).values():
        assert entry["kl"][0] == 0.0
        assert entry["top1_agreement"][0] == entry["top1_agreement"][1] > 0
        assert entry["router_agreement"][0] == entry["router_agreement"][1] > 0


def test_a_model_without_experts_has_no_router_agreement() -> None:
    said = Scorer(tiny_model("llama")).said(plan_requests(REQUESTS, OWNERS))
    assert {tuple(entry) for entry in compare(said, said).values()} == {("kl", "top1_agreement")}


def test_nothing_to_compare_is_no_value() -> None:
    said = Scorer(tiny_model("mixtral")).said(plan_requests([], []))
    assert compare(said, said) == {}


def test_numbers_of_documents_may_have_gaps() -> None:
    said = Scorer(tiny_model("mixtral")).said(plan_requests(REQUESTS[:2], [3, 1]))
    assert compare(said, said).keys() == {1, 3}


def test_models_that_do_not_belong_together_are_refused() -> None:
    said = Scorer(tiny_model("mixtral")).said(plan_requests(REQUESTS, OWNERS))
    other = Scorer(tiny_model("mixtral", vocab_size=300)).said(plan_requests(REQUESTS, OWNERS))
    with pytest.raises(ValueError, match=r"264\) must have the reference's .*300\)"):
        compare(other, said)
    with pytest.raises(ValueError, match=r"do not share the experts modules \['model.layers.1.mlp.experts'\]"):
        compare(said._replace(routing=dict(list(said.routing.items())[:1])), said)
