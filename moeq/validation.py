"""What validate does between Lightning's hooks: models in memory, together or one after the other, batches through them.

The original of a comparison either runs beside the model on every batch ("memory"), or first, over all batches, leaving
its logits in the run folder ("disk"), so that only one of the two is ever held.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from moeq.models.identity import model_identity
from moeq.models.loading import DType, load_model, num_model_bytes
from moeq.tasks.decoders import examine
from moeq.tasks.documents import Document
from moeq.tasks.evaluate import Evaluator, LiveOriginal, Original, said_by
from moeq.tasks.evaluation import Sampling, TaskEvaluation
from moeq.tasks.likelihood import Scorer
from moeq.tasks.originals import choose_mode
from moeq.tasks.plan import Plan
from moeq.tasks.spec import Generation
from moeq.tasks.stored import StoredOriginal

ReferenceMode = Literal["auto", "memory", "disk"]


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
