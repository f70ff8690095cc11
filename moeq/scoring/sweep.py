"""Batches through a model of which one block at a time is in memory: one block on all of them, then the next one.

Between blocks, hidden states wait (``moeq.disk.waiting``).  A block is called as the model itself would call it
(``moeq.models.blocks``), and after the last one the model's own norm and head finish the pass, so the numbers are those
of the same passes in memory, bit for bit.  A cache would be as large as the model's, so plans have one pass.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.disk.checked import smallest
from moeq.disk.waiting import WaitingStates
from moeq.kernels.onednn import linears_by_onednn
from moeq.models.adapter import find_blocks
from moeq.models.blocks import capture_calls, fill_in, hand_on
from moeq.models.families import HAND_ON
from moeq.models.residency import Residency
from moeq.scoring.forward_plan import Plan, Segment
from moeq.scoring.likelihood import Scored, pass_inputs, run_pass, run_plan
from moeq.scoring.routing import record_routing
from moeq.scoring.scorer import Said


@torch.no_grad()
def sweep(
    model: Any,
    residency: Residency,
    plans: Sequence[Plan],
    waiting: WaitingStates,
    progress: Callable[[int], None] = lambda block: None,
) -> Generator[Said, None, None]:
    """What a model says of batches, in their order, each as soon as it has passed the last block.

    That block stays in memory until the last batch was taken, or the iterator is closed.

    Args:
        model: A causal LM in eval mode.
        residency: Of its blocks.
        plans: Of one pass each.
        waiting: Where hidden states wait; nothing else may use it.
        progress: Told the block after each batch.

    Raises:
        ValueError: A plan has two passes, or the disk is full.
    """
    if any(len(plan.segments) > 1 for plan in plans):
        raise ValueError("a model whose blocks are streamed runs plans of one pass; plan without TWO_PASSES")
    _, blocks = find_blocks(model)
    routed: list[list[str]] = [[] for _ in plans]
    for number in range(len(blocks)):
        residency.read_ahead(number + 1)
        with residency.resident(number):
            for batch, plan in enumerate(plans):
                if plan.segments:
                    routed[batch] += _advance(model, blocks, number, plan.segments[0], batch, waiting)
                progress(number)
                if number == len(blocks) - 1:
                    yield _finish(model, blocks, plan, batch, routed[batch], waiting)


def bytes_per_token(model: Any, plan: Plan) -> float:
    """Bytes of the hidden states of a token between two blocks, as a plan with passes has them."""
    segment = plan.segments[0]
    _, blocks = find_blocks(model)
    calls = capture_calls(model, blocks, pass_inputs(model, segment), 0)
    return calls[0].hidden.nbytes / segment.ids_BL.numel()


def _advance(
    model: Any, blocks: nn.ModuleList, number: int, segment: Segment, batch: int, waiting: WaitingStates
) -> list[str]:
    """Run a block on a batch, whose states wait before and after; returns the paths of its experts modules."""
    with linears_by_onednn(model), record_routing(model) as routing:
        # What embeds a batch is cheap; masks of all batches are not small enough to be kept.
        calls = capture_calls(model, blocks, pass_inputs(model, segment), number)
        device = calls[0].hidden.device
        hidden = waiting.take((batch, "hidden"), device) if number else calls[0].hidden
        handed = waiting.take((batch, "handed"), device) if (batch, "handed") in waiting else None
        hidden, handed = hand_on(blocks[number], hidden, fill_in(calls[number], handed))
    waiting.put((batch, "hidden"), hidden)
    if handed is not None:
        waiting.put((batch, "handed"), handed)
    for path, ids_TK in routing.items():
        waiting.put((batch, path), smallest(ids_TK))
    return list(routing)


def _finish(
    model: Any, blocks: nn.ModuleList, plan: Plan, batch: int, routed: Sequence[str], waiting: WaitingStates
) -> Said:
    """Norm and head on a batch that has passed the last block."""
    if not plan.segments:
        return Said(run_plan(model, plan), {})
    segment = plan.segments[0]
    inputs = pass_inputs(model, segment)
    device = inputs["input_ids"].device
    hidden = waiting.take((batch, "hidden"), device)
    handed = waiting.take((batch, "handed"), device) if (batch, "handed") in waiting else None
    with linears_by_onednn(model), _blocks_that_gave(blocks, hidden, handed):
        logits_KV, _ = run_pass(model, segment, use_cache=False, **inputs)
    routing = {path: waiting.take((batch, path), device).long() for path in routed}
    return Said(Scored(plan, logits_KV), routing)


@contextmanager
def _blocks_that_gave(blocks: nn.ModuleList, hidden: Tensor, handed: Any) -> Iterator[None]:
    """Within, blocks return what the last one gave, and compute nothing."""
    hands_on = any(type(block).__name__ in HAND_ON for block in blocks)

    def given(*_: Any, **__: Any) -> Any:
        return (hidden, handed) if hands_on else hidden

    patched: list[nn.Module] = list(blocks)
    for block in patched:
        block.forward = given
    try:
        yield
    finally:
        for block in patched:
            del block.forward
