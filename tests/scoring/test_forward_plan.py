"""What a plan computes, and that the sizes it is chosen by are the ones it has."""

from functools import reduce

import pytest
import torch

from moeq.scoring.forward_plan import plan_requests
from moeq.scoring.pass_cost import PASS_TOKENS, Extent, Layout, distinct_rows, extent_of, num_common
from moeq.tasks.documents import Request
from tests.scoring.requests import random_documents, random_requests

EXAMPLES = tuple(range(1, 201))


def test_choices_of_one_token_are_one_row_with_several_targets() -> None:
    requests = [Request(EXAMPLES, (letter,)) for letter in range(4)]
    plan = plan_requests(requests, [0] * 4)
    assert (plan.layout, plan.num_tokens) == ("plain", 200)
    assert plan.targets_N.tolist() == [0, 1, 2, 3]
    assert plan.source_N.tolist() == [0] * 4


def test_examples_of_all_documents_are_computed_once() -> None:
    requests = [Request((*EXAMPLES, 201 + i, 7, 8), (letter,)) for i in range(5) for letter in range(4)]
    plan = plan_requests(requests, [i // 4 for i in range(20)])
    assert plan.layout == "prefix"
    assert plan.num_tokens == 200 + 5 * 3


def test_a_context_is_computed_once_for_its_choices() -> None:
    requests = [Request((doc, *EXAMPLES), (choice, 5, 6)) for doc in range(2) for choice in range(10, 14)]
    plan = plan_requests(requests, [i // 4 for i in range(8)])
    assert (plan.layout, plan.num_tokens) == ("tree", 2 * (201 + 4 * 2))
    second = plan_requests(requests, [i // 4 for i in range(8)], without={"tree"})
    assert (second.layout, second.num_tokens) == ("document", 2 * 201 + 8 * 2)


@pytest.mark.parametrize("layout", ["plain", "prefix", "tree", "document"])
@pytest.mark.parametrize("seed", range(8))
def test_costs_are_the_tokens_that_are_computed(layout: Layout, seed: int) -> None:
    documents = random_documents(seed, 5, shared=3)
    # Texts of different documents that begin each other are found only when they are planned together.
    costs = reduce(Extent.__or__, (extent_of(document.requests) for document in documents)).costs()
    requests = [request for document in documents for request in document.requests]
    plan = plan_requests(requests, [d.index for d in documents for _ in d.requests], layout)
    passes = PASS_TOKENS * (layout in ("prefix", "document"))
    assert costs[layout] - passes == plan.num_tokens
    assert plan_requests(requests, plan.owners).layout == min(costs, key=lambda key: costs[key])


@pytest.mark.parametrize("seed", range(8))
def test_what_is_predicted_does_not_depend_on_the_layout(seed: int) -> None:
    requests, owners = random_requests(seed, 5)
    plans = [plan_requests(requests, owners, layout) for layout in ("plain", "prefix", "tree", "document")]
    expected = [
        (number, target)
        for number, request in enumerate(requests)
        for target in (*request.continuation, *((-100,) if request.open_end else ()))
    ]
    for plan in plans:
        assert list(zip(plan.request_N.tolist(), plan.targets_N.tolist(), strict=True)) == expected
        assert plan.owner_N.tolist() == [owners[number] for number, _ in expected]


@pytest.mark.parametrize("layout", ["plain", "prefix", "tree", "document"])
def test_spans_and_positions_hold_the_tokens_of_the_requests(layout: Layout) -> None:
    requests, owners = random_requests(4, 4)
    plan = plan_requests(requests, owners, layout)
    ids_T = torch.cat([segment.ids_BL.flatten() for segment in plan.segments])
    read_T = torch.zeros(0, dtype=torch.int64)
    offset = 0
    for segment in plan.segments:
        read_T = torch.cat([read_T, segment.read_K + offset])
        offset += segment.ids_BL.numel()
    of_owner: dict[int, list[int]] = {owner: [] for owner in owners}
    for start, stop, owner in zip(*(part.tolist() for part in plan.spans), strict=True):
        of_owner[owner] += ids_T[start:stop].tolist()
    before = []
    for request, owner in zip(requests, owners, strict=True):
        row = [*request.context, *request.continuation][: None if request.open_end else -1]
        assert of_owner[owner][: len(row)] == row
        del of_owner[owner][: len(row)]
        before += row[len(request.context) - 1 :]
    assert not any(of_owner.values())
    assert ids_T[read_T[plan.source_N]].tolist() == before


def test_rows_that_begin_others_are_found(generator: torch.Generator) -> None:
    rows = [tuple(torch.randint(0, 2, (int(n),), generator=generator).tolist()) for n in torch.arange(40) % 6 + 1]
    distinct, index = distinct_rows(rows)
    assert all(distinct[i][: len(row)] == row for row, i in zip(rows, index, strict=True))
    assert not any(a != b and b[: len(a)] == a for a in distinct for b in distinct)
    assert len(set(distinct)) == len(distinct)


def test_common_beginnings_are_counted() -> None:
    assert num_common((1, 2, 3), (1, 2, 4, 5)) == 2
    assert num_common((1, 2), (1, 2, 4)) == 2
    assert num_common((), (1,)) == num_common((2,), (1,)) == 0
