"""What an evaluation is going to take: the original where it runs first, the model, and each task.

    held         the whole model (and the original, where it runs beside it), or what lies outside of the blocks and one
                 block, with the parts that it is loaded from
    activations  of the largest batch in one block (``moeq.models.sizes``)
    logits       positions that are read, in the model's dtype and in float32, twice where two models are compared
    waiting      hidden states of all batches of a task between the blocks of a streamed model, up to their bound
    time         tokens * blocks * seconds of a token in one block, and for each task of a streamed model the bytes of
                 its files / the rate at which they are read

Seconds and rate are measured on one block.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from moeq.evaluation.evaluator import plan_documents
from moeq.evaluation.task_evaluation import TaskEvaluation
from moeq.models.adapter import Adapter
from moeq.models.blocks import capture_calls, run_block
from moeq.models.sizes import ModelBytes, forward_bytes, hidden_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.scoring.pass_cost import Layout

_PROBE_TOKENS = 2048  # of the batch that is measured, at most


@dataclass(frozen=True)
class TaskWork:
    """What one task asks of a model, from the passes of its batches.

    Attributes:
        name: Of the task.
        num_tokens: That the model computes in all, padding included.
        largest: In the largest batch.
        longest: In the longest row.
        positions: Whose logits are read in the largest batch.
        all_positions: Those of all batches.
    """

    name: str
    num_tokens: int
    largest: int
    longest: int
    positions: int
    all_positions: int


@dataclass(frozen=True)
class Pace:
    """Measured on one block.

    Attributes:
        token: Seconds of a token in one block.
        read: Bytes of the model's files that are read per second, made into parameters.
    """

    token: float
    read: float


@dataclass(frozen=True)
class Role:
    """A model of an evaluation: the "model" or the "original".

    Attributes:
        name: Which of them.
        adapter: Its shapes; values are not read.
        sizes: Bytes of the dense model, streamed or not.
        held: Bytes of the model in memory, where it is not streamed: less than the dense ones of a packed export.
        pace: What was measured; None where nothing was.
    """

    name: str
    adapter: Adapter
    sizes: ModelBytes
    held: int
    pace: Pace | None = None

    def parts(self, block: int) -> dict[str, int]:
        """What is there while a block is worked on, by name."""
        return self.sizes.held(block) if self.sizes.streamed else {"model": self.held}


def task_work(evaluation: TaskEvaluation, without: Collection[Layout] = ()) -> TaskWork:
    """What a task's batches on this rank ask, in the passes that will be run."""
    plans = [plan_documents(documents, without) for documents in evaluation.batches if documents]
    segments = [segment for plan in plans for segment in plan.segments]
    read = [sum(len(segment.read_K) for segment in plan.segments) for plan in plans]
    return TaskWork(
        name=evaluation.task.name,
        num_tokens=sum(plan.num_tokens for plan in plans),
        largest=max((plan.num_tokens for plan in plans), default=0),
        longest=max((segment.ids_BL.shape[1] for segment in segments), default=0),
        positions=max(read, default=0),
        all_positions=sum(read),
    )


def evaluation_phases(
    tasks: Sequence[TaskWork], model: Role, original: Role | None, *, beside: bool, hidden_bytes_bound: int
) -> tuple[Phase, ...]:
    """Phases of a validate, in their order.

    Args:
        tasks: Those that are not finished.
        model: What is evaluated.
        original: What it is compared with, if anything.
        beside: Whether the original runs beside the model, or before it, leaving its logits on the disk.
        hidden_bytes_bound: Of hidden states that wait in memory.
    """
    phases: list[Phase] = []
    if original is not None and not beside and tasks:
        phases.append(_joined([_task_phase(original, task, {}, hidden_bytes_bound, stores=True) for task in tasks]))
    held = {"original": original.held} if original is not None and beside else {}
    parts = {"parts from files": max(model.sizes.loading, default=0)}
    whole = {"outside of blocks": model.sizes.outside} if model.sizes.streamed else {"model": model.held}
    phases.append(Phase("load model", "model", (Moment({**whole, **held}, parts),)))
    twice = original is not None
    phases += [_task_phase(model, task, held, hidden_bytes_bound, compared=twice) for task in tasks]
    return tuple(phases)


def measure_pace(adapter: Adapter, ids_BT: torch.Tensor, stored: int) -> Pace:
    """Load one block and run it on some tokens, which are on its device; ``stored`` are its bytes in the files."""
    start = time.perf_counter()
    with adapter.resident(0), torch.no_grad():
        loaded = time.perf_counter() - start
        call = capture_calls(adapter.model, adapter.blocks, {"input_ids": ids_BT}, last=0)[-1]
        for _ in range(2):  # once to warm up
            start = time.perf_counter()
            run_block(adapter.blocks[0], call.hidden, call)
            if ids_BT.is_cuda:
                torch.cuda.synchronize(ids_BT.device)
            seconds = time.perf_counter() - start
    return Pace(seconds / ids_BT.numel(), stored / max(loaded, 1e-6))


def probe_shape(tasks: Sequence[TaskWork]) -> tuple[int, int]:
    """Rows and tokens of a batch to measure: as long as the longest row, up to a bound."""
    length = max(1, min(_PROBE_TOKENS, max((task.longest for task in tasks), default=1)))
    return max(1, _PROBE_TOKENS // length), length


def _task_phase(
    role: Role, task: TaskWork, beside: dict[str, int], bound: int, *, stores: bool = False, compared: bool = False
) -> Phase:
    """All batches of a task through a model."""
    sizes, adapter = role.sizes, role.adapter
    block = max(range(len(sizes.blocks)), key=sizes.blocks.__getitem__)
    itemsize = max(1, hidden_bytes(adapter, 1) // _width(adapter))
    vocabulary = int(adapter.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    logits = task.positions * vocabulary * (itemsize + 8) * (2 if compared else 1)
    held = {
        **role.parts(block),
        **beside,
        "activations": forward_bytes(adapter, block, task.largest, task.longest),
        "logits": logits,
    }
    waiting = min(bound, hidden_bytes(adapter, task.num_tokens)) if sizes.streamed else 0
    parts = sizes.loading[block] if sizes.streamed else 0
    seconds = None
    if role.pace is not None:
        reading = sum(sizes.stored) / role.pace.read if sizes.streamed else 0.0
        seconds = task.num_tokens * len(sizes.blocks) * role.pace.token + reading
    return Phase(
        kind="original" if stores else f"task {task.name}",
        label="original" if stores else task.name,
        moments=(
            Moment(held, {"hidden states": waiting}),
            Moment(role.parts(block), {"parts from files": parts, "hidden states": waiting}),
        ),
        disk=task.all_positions * vocabulary * itemsize if stores else 0,
        seconds=seconds,
    )


def _joined(phases: Sequence[Phase]) -> Phase:
    """One phase of several that follow each other."""
    seconds = [phase.seconds for phase in phases if phase.seconds is not None]
    moments = tuple(moment for phase in phases for moment in phase.moments)
    disk = sum(phase.disk for phase in phases)
    return Phase(phases[0].kind, phases[0].label, moments, disk, sum(seconds) if seconds else None)


def _width(adapter: Adapter) -> int:
    return int(adapter.model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
