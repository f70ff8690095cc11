"""A batch of documents through the model and, where there is one, the original: a ``Result`` for each document.

Likelihood tasks are scored in one plan of forward passes; what is compared with the original are the same positions of
the same plan.  Generation tasks write text, which is judged as text or, for programs, by running them; they are
compared along the text that would be right, as two models that write different texts cannot be compared along either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeq.tasks.documents import Document, Result
from moeq.tasks.evaluation import Sampling
from moeq.tasks.finite import NonFiniteError, first_non_finite
from moeq.tasks.generation import generate
from moeq.tasks.likelihood import Plan, Scored, Scorer, outcomes, plan_requests
from moeq.tasks.originals import LiveOriginal, StoredOriginal, compare
from moeq.tasks.passk import pass_at_k
from moeq.tasks.sandbox import Limits, run_programs
from moeq.tasks.spec import Code, Generation, Outcome, Rolling, Task, Values, Windows


@dataclass
class Evaluator:
    """What it takes to evaluate a document of any task.

    Attributes:
        scorer: Runs plans on the model.
        tokenizer: Of the model.
        original: The original's side of a comparison, or None.
        sampling: How text is generated.
        limits: Of programs; None refuses to run any.
        num_workers: Programs that run at the same time.
    """

    scorer: Scorer
    tokenizer: Any
    original: LiveOriginal | StoredOriginal | None = None
    sampling: Sampling = Sampling()
    limits: Limits | None = None
    num_workers: int = 1

    def run(self, task: Task, documents: Sequence[Document]) -> list[Result]:
        """Results of a batch, in the order of its documents.

        Raises:
            NonFiniteError: Logits are not finite; names the task, the documents and the block.
        """
        scores: list[tuple[Values, dict[str, Any]]]
        if isinstance(task, Code):
            scores = self._programs(task, documents)
        elif isinstance(task, Generation):
            scores = self._texts(task, documents)
        else:
            scores = [({}, {}) for _ in documents]
        if self.original is not None or not isinstance(task, Generation):
            for (values, details), (more, seen) in zip(scores, self._likelihoods(task, documents), strict=True):
                values.update(more)
                details.update(seen)
        return [
            Result(document.index, document.key, document.groups, values, details)
            for document, (values, details) in zip(documents, scores, strict=True)
        ]
