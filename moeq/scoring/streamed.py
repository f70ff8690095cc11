"""The scorer of a model that does not fit: all batches of a task pass a block before the next block is read.

It is told the batches of a task before they come.  At the first one it sweeps all of them, or as many as may wait on
the disk, through the blocks; answers then come one by one, as from a model in memory.
"""

from collections import deque
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from typing_extensions import override

from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import find_blocks
from moeq.models.residency import Residency
from moeq.scoring.forward_plan import Plan
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import FAILURES, TWO_PASSES, Said, Scorer, described, difference, trial_plans
from moeq.scoring.sweep import bytes_per_token, sweep

Answers = Generator[Said, None, None]


@dataclass(frozen=True)
class Waiting:
    """Where hidden states wait between blocks.

    Attributes:
        folder: Where what exceeds the memory waits.
        memory_bytes: Of what waits in memory.
        total_bytes: Of the hidden states that wait at once, wherever; the batches of a task that have more are swept
            in groups, each of at least one batch.
    """

    folder: Path
    memory_bytes: int
    total_bytes: int


class StreamedScorer(Scorer):
    """Runs batches through a model whose blocks are streamed, in layouts of one pass.

    Args:
        model: A causal LM in eval mode.
        residency: Of its blocks.
        waiting: Where hidden states wait.
        without: Layouts that are not used, besides those of two passes.
    """

    def __init__(self, model: Any, residency: Residency, waiting: Waiting, without: Collection[Layout] = ()) -> None:
        super().__init__(model, {*without, *TWO_PASSES})
        self.residency, self.waiting = residency, waiting
        self._task = ""
        self._expected: deque[Plan] = deque()
        self._answers: Answers | None = None
        self._num_swept = 0

    @override
    def expect(self, task: str, plans: Iterable[Plan]) -> None:
        """Say which batches of a task are going to come, in this order: they are swept together."""
        self._stop()
        self._task, self._expected = task, deque(plans)

    @override
    def said(self, plan: Plan) -> Said:
        if not self._expected or not _are_same(self._expected[0], plan):
            self.expect(self._task, [plan])
        if self._answers is None:
            group = self._next_group()
            self._answers, self._num_swept = self._answered(group), len(group)
        said = next(self._answers)
        self._expected.popleft()
        self._num_swept -= 1
        if self._num_swept == 0:
            self._stop()
        return said

    @override
    def run_again(self, plan: Plan) -> None:
        for _ in self._sweep([plan]):
            pass

    def _stop(self) -> None:
        """End the sweep, which gives back its block and its place on the disk."""
        if self._answers is not None:
            self._answers.close()
        self._answers = None

    def _next_group(self) -> list[Plan]:
        """The batches that come next, as many as may wait at once."""
        group: list[Plan] = []
        total, per_token = 0.0, 0.0
        for plan in map(self.possible, self._expected):
            if plan.segments and not per_token:
                per_token = bytes_per_token(self.model, plan)
            total += per_token * plan.num_tokens
            if group and total > self.waiting.total_bytes:
                break
            group.append(plan)
        return group

    def _answered(self, plans: Sequence[Plan]) -> Answers:
        """Answers to plans in layouts that work; one that was not tried yet is tried in the same sweep."""
        plans = [self.possible(plan) for plan in plans]
        untried = next((plan for plan in plans if plan.layout not in self._problems), None)
        if untried is None:
            yield from self._sweep(plans)
            return
        with closing(self._sweep([*trial_plans(untried), *plans])) as answers:
            problem = _problem(answers)
            self.note(untried.layout, problem)
            if problem is None:
                yield from answers
                return
        yield from self._answered(plans)

    def _sweep(self, plans: Sequence[Plan]) -> Answers:
        num_blocks = len(find_blocks(self.model)[1])
        with (
            WaitingStates(self.waiting.memory_bytes, self.waiting.folder) as waiting,
            tqdm(total=num_blocks * len(plans), unit="batch", disable=None, leave=False) as bar,
        ):

            def progress(block: int) -> None:
                bar.set_description(f"{self._task}: block {block + 1}/{num_blocks}", refresh=False)
                bar.update()

            yield from sweep(self.model, self.residency, plans, waiting, progress)


def _problem(answers: Answers) -> str | None:
    """What is wrong with a layout, of which the answers are those of ``trial_plans`` first."""
    try:
        alone, together = next(answers), next(answers)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return described(error)
    return difference(together.scored, alone.scored)


def _are_same(a: Plan, b: Plan) -> bool:
    """Whether two plans are of the same batch, whatever their layouts."""
    return a.requests == b.requests and a.owners == b.owners
