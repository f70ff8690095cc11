"""A batch of documents through the model and, where there is one, the original: a ``Result`` for each document.

Likelihood tasks are scored in one plan of forward passes; what is compared with the original are the same positions of
the same plan.  Generation tasks write text, which is judged as text or, for programs, by running them; they are
compared along the text that would be right, since two models that write different texts share no other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from moeq.tasks.decoders import Decoding
from moeq.tasks.documents import Document, Result
from moeq.tasks.evaluation import Sampling
from moeq.tasks.finite import check_finite, first_non_finite
from moeq.tasks.generation import NonFiniteLogits, generate
from moeq.tasks.likelihood import Scored, Scorer, outcomes, plan_requests
from moeq.tasks.originals import Original, Said, compare
from moeq.tasks.passk import pass_at_k
from moeq.tasks.routing import record_routing
from moeq.tasks.sandbox import Limits, run_programs
from moeq.tasks.spec import Code, Generation, Outcome, Rolling, Task, Values, Windows

Judged = tuple[Values, dict[str, Any]]


@dataclass
class Evaluator:
    """What it takes to evaluate a document of any task.

    Attributes:
        scorer: Runs plans on the model.
        tokenizer: Of the model.
        original: The original's side of a comparison, or None.
        sampling: How text is generated.
        decoding: How the model can be decoded.
        limits: Of programs.
        num_workers: Programs that run at the same time.
    """

    scorer: Scorer
    tokenizer: Any
    original: Original | None = None
    sampling: Sampling = field(default_factory=Sampling)
    decoding: Decoding = field(default_factory=Decoding)
    limits: Limits = field(default_factory=Limits)
    num_workers: int = 1

    def run(self, task: Task, documents: Sequence[Document]) -> list[Result]:
        """Results of a batch, in the order of its documents.

        Raises:
            NonFiniteError: Logits are not finite; names the task, the document and the module.
        """
        judged: Sequence[Judged] = [({}, {}) for _ in documents]
        compared: dict[int, Values] = {}
        if isinstance(task, Generation):
            judged = self._judge(task, documents, self._write(task, documents))
        if self.original is not None or not isinstance(task, Generation):
            scored, compared = self._score(task, documents)
            if not isinstance(task, Generation):
                judged = list(_likelihoods(task, documents, scored))
        return [
            Result(document.index, document.key, document.groups, values | compared.get(i, {}), details)
            for i, (document, (values, details)) in enumerate(zip(documents, judged, strict=True))
        ]

    def _score(self, task: Task, documents: Sequence[Document]) -> tuple[Scored, dict[int, Values]]:
        """Logits of every request of a batch, and by document what a comparison with the original says."""
        owners = [i for i, document in enumerate(documents) for _ in document.requests]
        plan = plan_requests([request for document in documents for request in document.requests], owners)
        model = self.scorer.model
        with record_routing(model) as routing:
            scored = self.scorer.run(plan)
        check_finite(
            scored.logits_NV,
            _indices(scored, documents),
            model=model,
            run=lambda: self.scorer.run(plan),
            task=task.name,
        )
        if self.original is None:
            return scored, {}
        ...

    def _write(self, task: Generation, documents: Sequence[Document]) -> list[list[str]]:
        """What the model writes after each prompt: one text, or the samples of a program."""
        sampling = self.sampling
        several = isinstance(task, Code)
        prompts = [document.requests[0].context for document in documents]

        def write() -> list[list[str]]:
            return generate(
                self.scorer.model,
                prompts,
                tokenizer=self.tokenizer,
                stop=task.stop,
                max_new_tokens=task.max_new_tokens,
                seeds=[int(document.key[:8], 16) + sampling.seed for document in documents],
                num_samples=sampling.num_samples if several else 1,
                temperature=sampling.temperature if several else 0.0,
                top_p=sampling.top_p if several else 1.0,
                decoding=self.decoding,
            )

        try:
            return write()
        except NonFiniteLogits as error:
            where = first_non_finite(self.scorer.model, write)
            raise NonFiniteError(...) from error
