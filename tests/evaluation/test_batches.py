"""Batches cover every document once, on any number of ranks, within the budget."""

from collections import Counter

import pytest

from moeq.evaluation.batches import batches
from moeq.scoring.forward_plan import plan_requests
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import TWO_PASSES
from moeq.tasks.documents import Document, Request
from tests.scoring.requests import random_documents


def passes(batch: list[Document], without: frozenset[Layout] = frozenset()) -> list[int]:
    requests = [request for document in batch for request in document.requests]
    owners = [i for i, document in enumerate(batch) for _ in document.requests]
    plan = plan_requests(requests, owners, without=without)
    return [segment.ids_BL.numel() for segment in plan.segments]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_documents", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("budget", [1, 60, 400, 100000])
def test_all_ranks_together_have_every_document_once(world_size: int, num_documents: int, budget: int) -> None:
    documents = random_documents(num_documents, num_documents, shared=num_documents % 40)
    of_ranks = [batches(documents, budget, rank, world_size) for rank in range(world_size)]
    counts = Counter(document.index for of_rank in of_ranks for batch in of_rank for document in batch)
    assert counts == Counter(range(num_documents))
    sizes = [sum(map(len, of_rank)) for of_rank in of_ranks]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(batch) == 1 or max(passes(batch)) <= budget for of_rank in of_ranks for batch in of_rank)


def test_documents_with_the_same_examples_share_a_batch_and_nobody_else_is_in_it() -> None:
    examples = [tuple(range(start, start + 100)) for start in (0, 1000, 2000)]
    documents = [Document(i, str(i), {}, (), (Request((*examples[i % 3], 3000 + i, 7, 8), (5,)),)) for i in range(30)]
    cut = batches(documents, 10000)
    assert sorted({document.index % 3 for document in batch} for batch in cut) == [{0}, {1}, {2}]
    assert all(len(batch) == 10 and passes(batch) == [100, 10 * 3] for batch in cut)


def test_batches_that_run_in_one_pass_stay_within_the_budget_in_one_pass() -> None:
    shared = tuple(range(200))
    documents = [Document(i, str(i), {}, (), (Request((*shared, 300 + i), (5, 6, 7)),)) for i in range(12)]
    assert max(len(batch) for batch in batches(documents, 1000)) == 12
    cut = batches(documents, 1000, without=TWO_PASSES)
    assert [len(batch) for batch in cut] == [4, 4, 4]
    assert all(passes(batch, TWO_PASSES) == [4 * 203] for batch in cut)


def test_large_documents_come_first() -> None:
    documents = [Document(i, str(i), {}, (), (Request(tuple(range(i * 1000, i * 1000 + n)), (1,)),))
                 for i, n in enumerate((5, 90, 17, 300, 42))]  # fmt: skip
    assert [document.index for batch in batches(documents, 300) for document in batch] == [3, 1, 4, 2, 0]


def test_an_empty_text_is_a_document_too() -> None:
    documents = [Document(0, "", {}, (), ()), *random_documents(0, 3)[1:], Document(3, "", {}, (), ())]
    of_ranks = [batches(documents, 100, rank, 2) for rank in range(2)]
    assert Counter(d.index for of_rank in of_ranks for batch in of_rank for d in batch) == Counter(range(4))


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_tokens \(0\) must be positive"):
        batches([], 0)
