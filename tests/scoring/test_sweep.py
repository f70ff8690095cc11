"""A model whose blocks are streamed says bit for bit what the same passes in memory say, in every family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.stream import BlockStream, open_stream
from moeq.disk.waiting import WaitingStates
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.scorer import Said, Scorer
from moeq.scoring.sweep import bytes_per_token, sweep
from tests.families import SUPPORTED
from tests.scoring.requests import random_requests
from tests.tiny import save_tiny

# Their reference kernels for CPUs take a second for what takes others a hundredth.
SLOW = ("bailing_hybrid", "granitemoehybrid")


def opened(folder: Path) -> tuple[Any, BlockStream]:
    return open_stream(folder, None, lambda dtype: dtype)


def plans_of(*layouts: Any) -> list[Plan]:
    return [plan_requests(*random_requests(seed, 3), layout) for seed, layout in enumerate(layouts, 1)]


def assert_equal(said: Said, expected: Said) -> None:
    assert torch.equal(said.scored.logits_KV, expected.scored.logits_KV)
    assert said.scored.plan is expected.scored.plan
    assert said.routing.keys() == expected.routing.keys()
    for name, ids_TK in expected.routing.items():
        assert torch.equal(said.routing[name], ids_TK), name


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in SLOW])
def test_a_streamed_model_says_what_the_same_passes_in_memory_say(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", dtype=torch.float32)
    scorer = Scorer(load_model(str(folder)))
    (tree,) = plans_of("tree")
    plans = [plan for plan in (tree, *plans_of("plain", "plain")) if scorer.settled(plan) is plan]
    expected = [scorer.said(plan) for plan in plans]
    model, stream = opened(folder)
    with WaitingStates(20_000, tmp_path / "run") as waiting:
        for said, wanted in zip(sweep(model, stream, plans, waiting), expected, strict=True):
            assert_equal(said, wanted)
        assert (waiting.bytes_in_memory, waiting.bytes_on_disk) == (0, 0)
    assert stream.num_loads == len(stream.blocks)


def test_each_batch_passes_a_block_before_the_next_block_is_read_and_one_is_held(tmp_path: Path) -> None:
    model, stream = opened(save_tiny("mixtral", tmp_path / "model", num_hidden_layers=3))
    plans, seen = plans_of("plain", "plain", "tree"), []

    def held(block: int) -> None:
        there = [not all(p.is_meta for p in each.parameters()) for each in stream.blocks]
        seen.append((block, there.index(True), sum(there)))

    with WaitingStates(0, tmp_path / "run") as waiting:
        answers = sweep(model, stream, plans, waiting, held)
        next(answers)
        assert seen == [*[(0, 0, 1)] * 3, *[(1, 1, 1)] * 3, (2, 2, 1)]
        answers.close()
    assert all(parameter.is_meta for parameter in stream.blocks.parameters())
    assert stream.num_loads == 3


def test_hidden_states_wait_in_their_own_dtype_within_the_bound_of_memory(tmp_path: Path) -> None:
    model, stream = opened(save_tiny("mixtral", tmp_path / "model", dtype=torch.bfloat16))
    plans, most = plans_of(*["plain"] * 6), [0, 0]
    assert bytes_per_token(model, plans[0]) == 64 * 2
    tokens = sum(plan.num_tokens for plan in plans)
    with WaitingStates(4000, tmp_path / "run") as waiting:

        def watch(_: int) -> None:
            most[:] = max(most[0], waiting.bytes_in_memory), max(most[1], waiting.bytes_on_disk)

        for _ in sweep(model, stream, plans, waiting, watch):
            pass
    assert most[0] <= 4000
    # Two experts of each of two blocks, a byte each.
    assert sum(most) <= tokens * (64 * 2 + 2 * 2)
    assert sum(most) > tokens * 64 * 2 * 0.8


def test_a_batch_without_requests_says_nothing_and_two_passes_are_refused(tmp_path: Path) -> None:
    model, stream = opened(save_tiny("mixtral", tmp_path / "model"))
    with WaitingStates(0, tmp_path / "run") as waiting:
        said, other = sweep(model, stream, [plan_requests([], []), *plans_of("plain")], waiting)
        assert said.scored.logits_KV.shape[0] == 0
        assert said.routing == {}
        assert len(other.routing) == 2
        with pytest.raises(ValueError, match="runs plans of one pass"):
            next(sweep(model, stream, plans_of("document"), waiting))
