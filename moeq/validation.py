"""What validate does between Lightning's hooks: models in memory one way or the other, batches through them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from moeq.tasks.documents import Document
from moeq.tasks.evaluate import Evaluator
from moeq.tasks.evaluation import TaskEvaluation


class Validation:
    """The evaluations of a run and what evaluates them.

    Args:
        evaluations: One per task, in the order of the loaders.
        evaluator: Runs batches.
    """

    def __init__(self, evaluations: Sequence[TaskEvaluation], evaluator: Evaluator) -> None:
        self.evaluations, self.evaluator = evaluations, evaluator

    def step(self, documents: Sequence[Document], index: int) -> None:
        """Evaluate one batch of the task of loader ``index``; an empty batch is a rank without documents."""
        if not documents:
            return
        evaluation, start = self.evaluations[index], time.perf_counter()
        results = self.evaluator.run(evaluation.task, documents)
        evaluation.add(results, time.perf_counter() - start)
