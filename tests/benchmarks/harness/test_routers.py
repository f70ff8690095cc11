"""The gap of a router is that of its own logits, and is nothing where two experts are the same."""

import math

import pytest
import torch

from benchmarks.harness.routers import router_gap
from tests.tiny import tiny_model

SEQUENCES = [[5, 7, 9, 11, 200, 31], [8, 8, 1]]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"])
def test_the_gap_is_the_smallest_between_sorted_router_logits(family: str) -> None:
    model = tiny_model(family)
    gaps = []
    for sequence in SEQUENCES:
        for logits_TE in model(input_ids=torch.tensor([sequence]), output_router_logits=True).router_logits:
            for logits_E in logits_TE:
                _, last, following, *_ = sorted(logits_E.tolist(), reverse=True)
                gaps.append((last - following) / max(1.0, abs(last)))
    assert len(gaps) == 2 * 9
    assert router_gap(model, SEQUENCES) == pytest.approx(min(gaps), abs=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_equal_experts_tie() -> None:
    model = tiny_model("qwen2_moe")
    for block in model.model.layers:
        block.mlp.gate.weight[:] = block.mlp.gate.weight[:1]
    assert router_gap(model, SEQUENCES) == 0.0


def test_a_dense_model_has_no_router_that_could_tie() -> None:
    assert router_gap(tiny_model("llama"), SEQUENCES) == math.inf
