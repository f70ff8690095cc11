"""Passes that share tokens say what each request run alone says, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeq.scoring.forward_plan import plan_requests
from moeq.scoring.likelihood import outcomes, run_plan
from moeq.scoring.pass_cost import Layout
from moeq.scoring.routing import record_routing, same_routing_by_owner
from moeq.scoring.scorer import Scorer
from moeq.tasks.documents import Request
from tests.families import SUPPORTED
from tests.scoring.requests import random_requests, reference_logits, reference_routing
from tests.tiny import tiny_model

LAYOUTS: tuple[Layout, ...] = ("plain", "prefix", "tree", "document")
# Their reference kernels for CPUs take a second for what takes others a hundredth.
SLOW = ("bailing_hybrid", "granitemoehybrid")
# Equal scores of tokens are chosen between by the length of the text; with as many chosen as there are, none is.
CHOOSE_ALL = {"index_topk": 512}
# What transformers 5.23 cannot do with the caches of these.
BROKEN = {"jamba": ("prefix", "document"), "minimax": ("prefix", "document")}


def model_of(family: str) -> Any:
    chooses = family in ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text", "hy_v4")
    return tiny_model(family, **(CHOOSE_ALL if chooses else {}))


def relative_error(logits_NV: Tensor, expected_NV: Tensor) -> float:
    return float(((logits_NV - expected_NV).square().mean(-1).sqrt() / expected_NV.std(-1)).max())


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in SLOW])
def test_whatever_the_layout_the_scorer_gives_what_each_request_alone_gives(family: str) -> None:
    model = model_of(family)
    requests, owners = random_requests(seed=1, num_documents=4)
    expected_NV = reference_logits(model, requests)
    scorer = Scorer(model)
    for layout in LAYOUTS:
        scored = scorer.run(plan_requests(requests, owners, layout))
        assert relative_error(scored.logits_NV, expected_NV) < 1e-4, (layout, scored.plan.layout, scorer.fallbacks)
        if layout in BROKEN.get(family, ()):
            assert scored.plan.layout == "plain"
            assert any(layout in fallback for fallback in scorer.fallbacks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("seed", range(6))
def test_layouts_work_on_attention_of_random_requests(layout: Layout, family: str, seed: int) -> None:
    model = tiny_model(family)
    requests, owners = random_requests(seed, num_documents=seed, shared=seed % 3)
    scored = run_plan(model, plan_requests(requests, owners, layout))
    if not requests:
        assert scored.logits_NV.shape[0] == 0
        return
    expected_NV = reference_logits(model, requests)
    assert scored.logits_NV.shape == expected_NV.shape
    assert relative_error(scored.logits_NV, expected_NV) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_next", "granitemoe_swa"])
def test_recurrence_and_short_windows_share_in_the_ways_they_can(family: str) -> None:
    model = model_of(family)
    scorer = Scorer(model)
    requests, owners = random_requests(seed=1, num_documents=4, shared=30)
    layouts = [scorer.run(plan_requests(requests, owners, layout)).plan.layout for layout in LAYOUTS]
    assert layouts[0] == "plain"
    assert layouts[1] == "prefix"
    assert layouts[2] != "tree"
    assert layouts[3] == "document"


def test_a_cache_that_forgets_is_noticed_once_and_said() -> None:
    model = tiny_model("jamba")
    scorer = Scorer(model)
    requests, owners = random_requests(seed=1, num_documents=4)
    for _ in range(2):
        assert scorer.run(plan_requests(requests, owners, "prefix")).plan.layout == "plain"
    assert sum(fallback.startswith("layout prefix: logits differ by") for fallback in scorer.fallbacks) == 1


def test_log_likelihoods_and_argmax_equal_a_loop_over_tokens() -> None:
    model = tiny_model("mixtral")
    requests, owners = random_requests(seed=3, num_documents=4)
    ids: list[int] = []
    with torch.no_grad():  # a request that the model would continue so itself
        for _ in range(3):
            ids.append(int(model(torch.tensor([[5, 6, 7, *ids]])).logits[0, -1].argmax()))
    requests, owners = [*requests, Request((5, 6, 7), tuple(ids))], [*owners, 4]
    scored = run_plan(model, plan_requests(requests, owners))
    logits_NV, position = reference_logits(model, requests).double(), 0
    for request, outcome in zip(requests, outcomes(scored, len(requests)), strict=True):
        logits_TV = logits_NV[position : position + len(request.continuation)]
        log_prob_TV = logits_TV - logits_TV.exp().sum(-1, keepdim=True).log()
        expected = sum(float(row[token]) for row, token in zip(log_prob_TV, request.continuation, strict=True))
        assert outcome.loglikelihood == pytest.approx(expected, rel=1e-5)
        assert outcome.is_greedy == (logits_TV.argmax(-1).tolist() == list(request.continuation))
        position += len(request.continuation) + request.open_end
    assert position == len(logits_NV)
    assert outcomes(scored, len(requests))[-1].is_greedy


def test_logits_are_computed_only_where_something_is_predicted() -> None:
    model = tiny_model("qwen2_moe")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    requests = [Request(tuple(range(1, 31)), (letter,)) for letter in range(40, 44)]
    scored = run_plan(model, plan_requests(requests, [0] * 4))
    handle.remove()
    assert seen == [(1, 1, 264)]
    assert scored.logits_NV.shape == (4, 264)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_counts_of_a_document_are_those_of_its_requests_alone(
    layout: Layout, generator: torch.Generator
) -> None:
    reference, model = tiny_model("qwen2_moe"), tiny_model("qwen2_moe")
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    requests, owners = random_requests(seed=2, num_documents=4)
    plan = plan_requests(requests, owners, layout)
    with record_routing(model) as routing, record_routing(reference) as reference_choices:
        run_plan(model, plan)
        run_plan(reference, plan)
    num_same, num_pairs = same_routing_by_owner(routing, reference_choices, plan.spans, 4)
    expected_same, expected_pairs = [0] * 4, [0] * 4
    for request, owner in zip(requests, owners, strict=True):
        ours, theirs = reference_routing(model, request), reference_routing(reference, request)
        for name, ids_TK in ours.items():
            for a, b in zip(ids_TK.tolist(), theirs[name].tolist(), strict=True):
                expected_same[owner] += set(a) == set(b)
                expected_pairs[owner] += 1
    assert num_same.tolist() == expected_same
    assert num_pairs.tolist() == expected_pairs
    assert 0 < sum(expected_same) < sum(expected_pairs)
