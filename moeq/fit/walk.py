"""Walk of the calibration batches through the blocks of a model: one pass after another, one batch at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeq.fit.activations import ActivationStore, BlockBatch
from moeq.fit.memory import MemoryRow, memory_row
from moeq.fit.resume import Resume
from moeq.fit.run import Run
from moeq.fit.schedule import Pass, Sequential, build_schedule
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, run_block, until_reached
from moeq.quant.spec import Routing


@dataclass(frozen=True)
class WalkSpec:
    """How a block is divided into passes.

    Attributes:
        sequential: "stage": one pass per stage of a block; "block": one pass per block.
        routing: Which tokens the Hessians of routed experts are made of.
        hessian_gib: Bound on the Hessians of a pass, in GiB.
    """

    sequential: Sequential = "stage"
    routing: Routing = "routed"
    hessian_gib: float = 16.0


class Walk:
    """The passes of a fit, and what waits between them.

    Args:
        adapter: The model.
        run: State of the run; it says what the passes are needed for.
        resume: Its finished blocks.
        spec: How a block is divided into passes.
        announce: Tells the user something, once for all ranks.

    Raises:
        ValueError: A finished block belongs to another run, or the schedule is impossible.
    """

    def __init__(
        self, adapter: Adapter, run: Run, resume: Resume, spec: WalkSpec, announce: Callable[[str], None]
    ) -> None:
        self.adapter, self.run, self.resume = adapter, run, resume
        first_block, sites = resume.load(announce), resume.sites
        if first_block:
            announce(f"Resuming: blocks 0 to {first_block - 1} of {len(sites)} are finished in {resume.folder}")
        if not run.needs.originals:
            resume.commit()
        self.schedule = build_schedule(
            sites, survey=run.needs.survey and first_block == 0, sequential=spec.sequential, first_block=first_block,
            hessian_gib=spec.hessian_gib, originals=run.needs.originals, routers=run.needs.routers,
            routing=spec.routing,
        )  # fmt: skip
        self._activations, self._originals = ActivationStore(), ActivationStore()
        self._calls: dict[int, tuple[BlockCall, Tensor]] = {}
        self._position, self._pass_start = 0, time.perf_counter()

    @property
    def current_pass(self) -> Pass:
        """What is swept now."""
        return self.schedule[self._position]

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor], index: int) -> None:
        """Run one batch through the block of the current pass, as far as the pass needs it.

        Args:
            batch: ``input_ids`` int64 [B, T], and ``attention_mask`` where there is padding.
            index: Of the batch, the same in every pass.
        """
        current, blocks = self.current_pass, self.adapter.blocks
        calls = capture_calls(self.adapter.model, blocks, batch)
        if current.kind == "original":
            self._originals.advance(index, current.block + 1, calls, blocks)
            return
        hidden = self._activations.advance(index, current.block, calls, blocks)
        if self.run.needs.originals:
            self._calls[index] = calls[current.block], _keep_BT(batch)
        entered, finished = self.adapter.observed_modules(current.observed)
        if current.kind == "router":
            entered = list(self.adapter.routers(current.block).values())
        # A pass ends with the last module it is for; a survey, which has none, runs the whole block.
        with until_reached(entered, finished):
            run_block(blocks[current.block], hidden, calls[current.block])

    def block_batches(self) -> list[BlockBatch]:
        """The current block's inputs and the original's outputs, where a step asked for them before the first pass."""
        return [
            BlockBatch(self._activations.latest(batch), self._originals.latest(batch), call, keep_BT)
            for batch, (call, keep_BT) in sorted(self._calls.items())
        ]

    def end_pass(self) -> float:
        """Put a finished block on disk, drop what the pass alone needed, go on to the next; returns the seconds."""
        current = self.current_pass
        self.run.hessians.close()
        seconds = time.perf_counter() - self._pass_start
        self.run.seconds[current.label] = seconds
        if current.ends_block:
            self.resume.save(current.block)
        elif current.kind == "original" and current.block == self.resume.first_block - 1:
            self.resume.commit()  # the original blocks that come before were needed until now
        self._position, self._pass_start = self._position + 1, time.perf_counter()
        if current.kind == "survey" and self.current_pass.kind != "survey":
            self._activations.clear()  # what follows starts from the embeddings
        return seconds

    def memory_row(self, device: torch.device, measured: int) -> MemoryRow:
        """Expected and measured memory of the current pass on a device, in bytes."""
        waiting = sum(store.num_bytes(device) for store in (self._activations, self._originals))
        model: Any = self.adapter.model
        return memory_row(self.current_pass, model, waiting, measured)


def _keep_BT(batch: dict[str, Tensor]) -> Tensor:
    """bool: which tokens of a batch are no padding."""
    mask_BT = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
