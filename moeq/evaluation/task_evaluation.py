"""One task in a run: its documents, what is finished already, this rank's batches, and the metrics so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moeq.distributed import gather_lists
from moeq.evaluation.records import Records, reuse
from moeq.report.task_report import Description
from moeq.tasks.documents import Document, Result
from moeq.tasks.metrics import COMPARISONS, TaskMetrics
from moeq.tasks.rows import Rows
from moeq.tasks.task import Aggregate, Code, MultipleChoice, Task


@dataclass(frozen=True)
class Sampling:
    """How text is generated.

    Attributes:
        num_samples: Continuations per prompt of programs (HumanEval, MBPP); other tasks take one.
        temperature: 0 is greedy decoding; the papers of pass@k sample at 0.2 (k = 1) and 0.8 (k = 10, 100).
        top_p: Nucleus: the smallest set of tokens with this probability is sampled from.
        k: The ks of pass@k, each at most num_samples.
        seed: Of the samples; a document's samples depend on nothing else.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    k: tuple[int, ...] = (1,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples ({self.num_samples}) must be positive; 1 is greedy decoding's")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature ({self.temperature}) must not be negative and top_p ({self.top_p}) must be in (0, 1]; "
                "greedy decoding is temperature 0 and top_p 1"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples ({self.num_samples}) above 1 needs a temperature above 0, greedy samples being equal; "
                "choose temperature 0.8"
            )
        if not self.k or not 1 <= min(self.k) <= max(self.k) <= self.num_samples:
            raise ValueError(
                f"k {list(self.k)} of pass@k must lie between 1 and num_samples ({self.num_samples}); "
                "raise num_samples or lower k"
            )


def metric_kinds(task: Task, sampling: Sampling, compared: bool) -> dict[str, Aggregate]:
    """Kind of every metric that a task reports in a run, in the order of the tables."""
    kinds = {f"pass@{k}": "mean" for k in sampling.k} if isinstance(task, Code) else dict(task.metrics)
    return kinds | (COMPARISONS if compared else {})  # type: ignore[return-value]


class TaskEvaluation:
    """State of one task in a run.

    Args:
        task: The task.
        rows: Where its documents come from.
        documents: Those that are evaluated, of all ranks.
        num_available: How many the task has.
        kinds: Kind of every metric.
        records: Finished documents on disk.
        rank: This rank: the first one adds what earlier runs finished.

    Attributes:
        batches: Those of this rank, of the documents that are not finished.
        limit: The Trainer's ``limit_val_batches``: how many of them run, or (float) which share.
    """

    def __init__(
        self,
        task: Task,
        rows: Rows,
        documents: Sequence[Document],
        num_available: int,
        kinds: dict[str, Aggregate],
        records: Records,
        rank: int,
    ) -> None:
        self.task, self.rows, self.documents, self.num_available = task, rows, documents, num_available
        self.metrics = TaskMetrics(task.name, kinds, {document.groups for document in documents})
        self.records = records
        resumed, self.unfinished = reuse(records.finished(), documents)
        self.num_resumed = len(resumed)
        self.batches: list[list[Document]] = []
        self.limit: int | float = 1.0
        self.seconds = 0.0
        self.fallbacks: dict[str, int] = {}
        self.protections: tuple[str, ...] = ()
        self._evaluated: list[int] = []
        self._count(resumed if rank == 0 else [])

    @property
    def expected(self) -> list[list[Document]]:
        """The batches that are going to run: without those that ``limit_val_batches`` leaves out, and the empty one."""
        limit = self.limit if isinstance(self.limit, int) else int(self.limit * len(self.batches))
        return [batch for batch in self.batches[:limit] if batch]

    def add(self, results: Sequence[Result], seconds: float) -> None:
        """Keep the results of a batch: on disk first, then in the metrics."""
        self.records.add(results)
        self._count(results)
        self.seconds += seconds

    def _count(self, results: Sequence[Result]) -> None:
        self._evaluated += [result.index for result in results]
        for result in results:
            self.metrics.add(result)

    def description(self) -> Description:
        """Everything but the metrics that belongs into a report, of all ranks, which all must call it."""
        indices = set(gather_lists(self._evaluated))
        evaluated = [document for document in self.documents if document.index in indices]
        cut = [document.num_cut for document in evaluated if document.num_cut]
        partial = None
        if len(self.documents) < self.num_available:
            partial = "num_documents"
        elif len(evaluated) < len(self.documents):
            partial = "limit_val_batches"
        return {
            "split": self.rows.split, "origin": self.rows.origin, "sha256": self.rows.sha256,
            "shots_sha256": self.rows.shots_sha256, "num_shots": self.task.num_shots,
            "num_documents": len(evaluated), "num_available": self.num_available, "partial": partial,
            "num_tokens": sum(document.num_tokens for document in evaluated),
            "num_resumed": self.num_resumed, "num_truncated": len(cut), "num_tokens_cut": sum(cut),
            "seconds": self.seconds, "fallbacks": self.fallbacks, "chance": self._chance(),
            "protections": self.protections, "notes": self.records.notes,
        }  # fmt: skip

    def _chance(self) -> float | None:
        """What guessing would score, where documents are choices."""
        if not isinstance(self.task, MultipleChoice):
            return None
        return fmean(1 / len(self.task.choices(document.row)) for document in self.documents)
