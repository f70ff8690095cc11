"""Walk of the calibration batches through the blocks of a model: one pass after another, one batch at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.fit.activations import ActivationStore, BlockBatch, BlockBatches
from moeq.fit.probe import Probe
from moeq.fit.resume import Resume
from moeq.fit.run import Run
from moeq.fit.schedule import GIB, Pass, Sequential, build_schedule
from moeq.models.adapter import Adapter
from moeq.models.blocks import BlockCall, capture_calls, run_block, until_reached
from moeq.models.residency import InMemory
from moeq.quant.spec import Routing


@dataclass(frozen=True)
class WalkSpec:
    """How a block is divided into passes.

    Attributes:
        sequential: "stage": one pass per stage of a block; "block": one pass per block.
        routing: Which tokens the Hessians of routed experts are made of.
        hessian_gib: Bound on the Hessians of a pass, in GiB.
        hidden_gib: Bound on the hidden states that wait in memory between passes, in GiB; beyond it they are on disk.
    """

    sequential: Sequential = "stage"
    routing: Routing = "routed"
    hessian_gib: float = 16.0
    hidden_gib: float = 4.0


class Walk:
    """The passes of a fit, and what waits between them; one block is resident at a time.

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
        self.schedule = build_schedule(
            sites, survey=run.needs.survey and first_block == 0, sequential=spec.sequential, first_block=first_block,
            hessian_gib=spec.hessian_gib, originals=run.needs.originals, routers=run.needs.routers,
            routing=spec.routing,
        )  # fmt: skip
        bound = int(spec.hidden_gib * GIB / (2 if run.needs.originals else 1))
        self._activations, self._originals = (ActivationStore(WaitingStates(bound, resume.folder)) for _ in range(2))
        self.probe = Probe(adapter, WaitingStates(bound, resume.folder))
        self._calls: dict[int, tuple[BlockCall, Tensor]] = {}
        self._position, self._pass_start = 0, time.perf_counter()
        self._resident = ExitStack()

    def start(self) -> None:
        """Make the first block resident; what looks at all blocks before the first pass has none beside its own."""
        # Steps have counted for themselves what they did since the walk was planned.
        self._pass_start = time.perf_counter()
        if self.schedule:
            self._enter_pass(None)

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
        current, adapter = self.current_pass, self.adapter
        block, number = adapter.blocks[current.block], current.block
        call = capture_calls(adapter.model, adapter.blocks, batch, last=number)[-1]
        if current.kind in ("survey", "original", "advance"):
            store = self._originals if current.kind == "original" else self._activations
            store.advance(index, number, call, block)
            return
        if self.run.needs.originals:
            self._calls[index] = replace(call, hidden=call.hidden[:0]), _keep_BT(batch)
            if number == 0:
                self._activations.put(index, 0, call.hidden)
        call = self._activations.enter(index, number, call)
        entered, finished = adapter.observed_modules(current.observed)
        if current.kind == "router":
            entered = list(adapter.routers(number).values())
        with until_reached(entered, finished):  # a pass ends with the last module it is for
            run_block(block, call.hidden, call)

    def block_batches(self) -> Sequence[BlockBatch]:
        """The current block's inputs and the original's outputs, where a step asked for them before the first pass."""
        return BlockBatches(self._activations, self._originals, self._calls)

    def end_pass(self) -> float:
        """Put a finished block on disk, drop what the pass alone needed, go on to the next; returns the seconds."""
        current = self.current_pass
        self.run.hessians.close()
        seconds = time.perf_counter() - self._pass_start
        self.run.seconds[current.label] = seconds
        if current.ends_block:
            with self.run.meter.phase("block file", f"block {current.block} file"):
                self.resume.save(current.block)
        if current.kind == "advance":
            self.probe.advance(current.block)
        self._position, self._pass_start = self._position + 1, time.perf_counter()
        if self._position == len(self.schedule):
            self.close()
            return seconds
        if current.kind == "survey" and self.current_pass.kind != "survey":
            self._activations.clear()  # what follows starts from the embeddings
        self._enter_pass(current.block)
        return seconds

    def close(self) -> None:
        """Let go of the block, and of what waits."""
        self._resident.close()
        self._activations.clear()
        self._originals.clear()
        self._calls.clear()

    def _enter_pass(self, before: int | None) -> None:
        """Make the block of the current pass resident, as it is at the beginning of that pass."""
        block = self.current_pass.block
        if block != before:
            self._resident.close()
            loading = self.run.meter.phase("load block", f"block {block} load")
            with nullcontext() if isinstance(self.adapter.residency, InMemory) else loading:
                self._resident.enter_context(self.adapter.resident(block))
            following = (each.block for each in self.schedule[self._position :] if each.block != block)
            self.adapter.residency.read_ahead(next(following, len(self.adapter.blocks)))
        if self.current_pass.kind == "advance" and block < self.resume.first_block:
            self.resume.commit(block)


def _keep_BT(batch: dict[str, Tensor]) -> Tensor:
    """bool: which tokens of a batch are no padding."""
    mask_BT = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()
