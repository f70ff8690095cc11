"""The streamed scorer answers batch by batch what a model in memory answers, and sweeps as often as it must."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.stream import BlockStream, open_stream
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.scorer import TWO_PASSES, Said, Scorer
from moeq.scoring.streamed import StreamedScorer, Waiting
from moeq.tasks.documents import Request
from tests.scoring.requests import random_requests
from tests.tiny import save_tiny


def scorers(family: str, folder: Path, total_bytes: int = 1 << 40, **changes: Any) -> tuple[StreamedScorer, Scorer]:
    """The scorer of a streamed model, and one of the same model in memory with the same layouts."""
    save_tiny(family, folder / "model", dtype=torch.float32, **changes)
    model, stream = open_stream(folder / "model", None, lambda dtype: dtype)
    waiting = Waiting(folder / "run", 1000, total_bytes)
    return StreamedScorer(model, stream, waiting), Scorer(load_model(str(folder / "model")), TWO_PASSES)


def loads(scorer: StreamedScorer) -> int:
    assert isinstance(scorer.residency, BlockStream)
    return scorer.residency.num_loads


def shared_plans(num_batches: int) -> list[Plan]:
    """Batches of choices of several tokens after a context, which a tree computes in the fewest tokens."""
    plans = []
    for batch in range(num_batches):
        context = tuple(range(1 + batch, 60 + batch))
        plans.append(plan_requests([Request(context, (5 + choice, 6, 7)) for choice in range(4)], [0] * 4))
    return plans


def assert_equal(said: Said, expected: Said) -> None:
    assert said.scored.plan.layout == expected.scored.plan.layout
    assert torch.equal(said.scored.logits_KV, expected.scored.logits_KV)
    assert all(torch.equal(said.routing[name], ids_TK) for name, ids_TK in expected.routing.items())


def test_expected_batches_are_swept_once_and_answered_as_in_memory(tmp_path: Path) -> None:
    scorer, memory = scorers("qwen2_moe", tmp_path)
    plans = [*shared_plans(3), plan_requests([], []), plan_requests(*random_requests(1, 3, shared=80))]
    assert {plan.layout for plan in plans} == {"tree", "plain", "prefix"}
    scorer.expect("piqa", plans)
    for plan in plans:
        assert_equal(scorer.said(plan), memory.said(plan))
    assert loads(scorer) == 2
    assert scorer.fallbacks == memory.fallbacks == []
    assert all(parameter.is_meta for parameter in scorer.residency.blocks.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_tree_that_does_not_work_is_noticed_in_the_first_sweep_and_said(family: str, tmp_path: Path) -> None:
    scorer, memory = scorers(family, tmp_path)
    plans = shared_plans(2)
    for task in ("piqa", "boolq"):
        scorer.expect(task, plans)
        for plan in plans:
            said = scorer.said(plan)
            assert said.scored.plan.layout == "plain"
            assert_equal(said, memory.said(plan))
    assert scorer.fallbacks == memory.fallbacks
    assert len(scorer.fallbacks) == 1
    assert scorer.fallbacks[0].startswith("layout tree: ")


def test_what_may_not_wait_at_once_is_swept_in_groups(tmp_path: Path) -> None:
    plans = [plan_requests([Request((1, 2, 3), tuple(range(5, 34)))], [0]) for _ in range(7)]
    tokens = plans[0].num_tokens
    # Room for three batches, and for none.
    for total_bytes, num_sweeps in ((3 * tokens * 64 * 4, 3), (1, 7)):
        scorer, memory = scorers("mixtral", tmp_path / str(num_sweeps), total_bytes)
        scorer.expect("wikitext", plans)
        for plan in plans:
            assert_equal(scorer.said(plan), memory.said(plan))
        assert loads(scorer) == num_sweeps * 2


def test_a_batch_that_was_not_expected_is_answered_too(tmp_path: Path) -> None:
    scorer, memory = scorers("mixtral", tmp_path)
    first, second, third = shared_plans(3)
    scorer.expect("piqa", [first, second])
    for plan in (first, third, second):
        assert_equal(scorer.said(plan), memory.said(plan))


def test_an_interrupted_sweep_leaves_no_block_and_no_file(tmp_path: Path) -> None:
    scorer, _ = scorers("mixtral", tmp_path)
    plans = shared_plans(3)
    scorer.expect("piqa", plans)
    scorer.said(plans[0])
    scorer.expect("boolq", [])
    assert all(parameter.is_meta for parameter in scorer.residency.blocks.parameters())  # type: ignore[attr-defined]
    assert list((tmp_path / "run").iterdir()) == []


def test_an_error_in_a_block_is_no_fault_of_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, _ = scorers("mixtral", tmp_path)

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(nn.Linear, "forward", broken)
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        scorer.said(shared_plans(1)[0])
