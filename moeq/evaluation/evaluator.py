"""Evaluator of a batch of documents by the model and, where there is one, the original: a ``Result`` for each.

Likelihood tasks are scored in one plan of forward passes; what is compared with the original are the same positions of
the same plan.  Generation tasks write text, which is judged as text or, for programs, by running them; they are
compared along the text that would be right, since two models that write different texts share no other.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch

from moeq.decoding.decoders import Decoding
from moeq.decoding.generate import NonFiniteLogits, generate
from moeq.evaluation.reference_logits import LiveOriginal
from moeq.evaluation.task_evaluation import Sampling
from moeq.programs.passk import pass_at_k
from moeq.programs.sandbox import Limits, Verdict, run_programs
from moeq.scoring.comparison import compare
from moeq.scoring.finite import check_finite, first_non_finite, non_finite_error
from moeq.scoring.forward_plan import Plan, plan_requests
from moeq.scoring.likelihood import Scored, outcomes
from moeq.scoring.pass_cost import Layout
from moeq.scoring.scorer import Said, Scorer
from moeq.tasks.documents import Document, Result
from moeq.tasks.task import Code, Generation, LastWord, MultipleChoice, Outcome, Rolling, Task, Values

Judged = tuple[Values, dict[str, Any]]


class Original(Protocol):
    """The original's side of a comparison: in memory, or what it said before."""

    def said(self, plan: Plan) -> Said:
        """What the original says of a batch."""


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
        judged: list[Judged]
        compared: dict[int, Values] = {}
        if isinstance(task, Generation):
            judged = self._judge(task, documents, self._write(task, documents))
            if self.original is not None:
                _, compared = self._score(task, documents, self.original)
        else:
            scored, compared = self._score(task, documents, self.original)
            judged = list(_likelihoods(task, documents, scored))
        return [
            Result(document.index, document.key, document.groups, values | compared.get(i, {}), details)
            for i, (document, (values, details)) in enumerate(zip(documents, judged, strict=True))
        ]

    def _score(
        self, task: Task, documents: Sequence[Document], original: Original | None
    ) -> tuple[Scored, dict[int, Values]]:
        """Logits of every request of a batch, and by number of the document what the comparison says."""
        plan = plan_documents(documents)
        said = ask_checked(self.scorer, plan, task, documents)
        if original is None:
            return said.scored, {}
        if isinstance(original, LiveOriginal):  # what is stored was checked before
            return said.scored, compare(ask_checked(original.scorer, plan, task, documents, "the original"), said)
        return said.scored, compare(original.said(plan), said)

    def _write(self, task: Generation, documents: Sequence[Document]) -> list[list[str]]:
        """What the model writes after each prompt: one text, or the samples of a program."""
        # Samples are for pass@k; the protocols of all other tasks are greedy.
        sampling = self.sampling if isinstance(task, Code) else Sampling()

        def write() -> list[list[str]]:
            return generate(
                self.scorer.model,
                [document.requests[0].context for document in documents],
                tokenizer=self.tokenizer,
                stop=task.stop,
                max_new_tokens=task.max_new_tokens,
                seeds=[int(document.key[:8], 16) + sampling.seed for document in documents],
                num_samples=sampling.num_samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                decoding=self.decoding,
            )

        try:
            return write()
        except NonFiniteLogits as error:
            where = first_non_finite(self.scorer.model, write)
            raise non_finite_error(task.name, [documents[error.prompt].index], where) from error

    def _judge(self, task: Generation, documents: Sequence[Document], texts: Sequence[Sequence[str]]) -> list[Judged]:
        if not isinstance(task, Code):
            return [
                (task.score_text(document.row, text), {"text": text})
                for document, (text,) in zip(documents, texts, strict=True)
            ]
        programs = [task.program(d.row, text) for d, samples in zip(documents, texts, strict=True) for text in samples]
        verdicts = iter(run_programs(programs, self.limits, self.num_workers))
        return [_pass_rates(samples, list(islice(verdicts, len(samples))), self.sampling.k) for samples in texts]


def plan_documents(documents: Sequence[Document], without: Collection[Layout] = ()) -> Plan:
    """The cheapest passes for all requests of a batch, except for some layouts."""
    owners = [i for i, document in enumerate(documents) for _ in document.requests]
    requests = [request for document in documents for request in document.requests]
    return plan_requests(requests, owners, without=without)


def ask_checked(
    scorer: Scorer, plan: Plan, task: Task, documents: Sequence[Document], whose: str = "the model"
) -> Said:
    """What a model says of a batch; raises NonFiniteError where that is no number."""
    said = scorer.said(plan)
    ran = said.scored.plan
    logits_KV = said.scored.logits_KV
    index_K = torch.zeros(len(logits_KV), dtype=torch.int64)
    index_K[ran.source_N] = torch.tensor([document.index for document in documents])[ran.owner_N]
    check_finite(
        logits_KV,
        index_K,
        model=scorer.model,
        run=lambda: scorer.run_again(ran),
        task=task.name,
        whose=whose,
    )
    return said


def _likelihoods(task: Task, documents: Sequence[Document], scored: Scored) -> Iterator[Judged]:
    """Values of documents that are scored by likelihood alone."""
    found = iter(outcomes(scored, sum(len(document.requests) for document in documents)))
    for document in documents:
        yield _likelihood(task, document, list(islice(found, len(document.requests))))


def _likelihood(task: Task, document: Document, scores: list[Outcome]) -> Judged:
    total = sum(outcome.loglikelihood for outcome in scores)
    if isinstance(task, MultipleChoice | LastWord):
        details = {"loglikelihoods": [outcome.loglikelihood for outcome in scores]}
        return task.score(document.row, scores), details
    if isinstance(task, Rolling):
        return task.score(document.row, total), {"loglikelihood": total}
    num_tokens = sum(len(request.continuation) for request in document.requests)
    return {"perplexity": (-total, float(num_tokens))}, {}


def _pass_rates(samples: Sequence[str], verdicts: Sequence[Verdict], ks: Sequence[int]) -> Judged:
    num_passed = sum(verdict.passed for verdict in verdicts)
    values = {f"pass@{k}": (pass_at_k(len(samples), num_passed, k), 1.0) for k in ks}
    return values, {"texts": list(samples), "verdicts": [verdict.reason for verdict in verdicts]}
