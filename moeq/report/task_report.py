"""Report of one task after an evaluation, as plain data: measurements, and what they were measured on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

from moeq.tasks.metrics import COMPARISONS, Measurement, TaskMetrics
from moeq.tasks.task import Aggregate, Task


class Description(TypedDict):
    """What a task's numbers were measured on; counts are over all ranks.

    Attributes:
        split: Split of the data that was evaluated.
        origin: File or data set of the hub that it came from.
        sha256: Hash of the rows.
        num_shots: Examples in front of each prompt.
        num_documents: Documents evaluated.
        num_available: Documents that the task has.
        num_tokens: Tokens that went through the model.
        num_truncated: Documents that were longer than the model's window.
        partial: The option for which documents were left out; None where none were.
        fallbacks: How often something was not done as asked, by reason.
        seconds: Wall time.
        chance: What guessing would score, between 0 and 1; for choices only.
        protections: Of the execution of generated code, those that were in effect.
        shots_sha256: Hash of the rows that the examples come from; "" where there are none.
        num_resumed: Of the documents, those that an interrupted evaluation had finished.
        num_tokens_cut: Tokens that were cut from the truncated documents.
        notes: What happened to records of earlier evaluations.
    """

    split: str
    origin: str
    sha256: str
    num_shots: int
    num_documents: int
    num_available: int
    num_tokens: int
    num_truncated: int
    partial: str | None
    fallbacks: Mapping[str, int]
    seconds: float
    chance: NotRequired[float | None]
    protections: NotRequired[Sequence[str]]
    shots_sha256: NotRequired[str]
    num_resumed: NotRequired[int]
    num_tokens_cut: NotRequired[int]
    notes: NotRequired[Sequence[str]]


@dataclass(frozen=True)
class TaskReport:
    """Measurements of one task.

    Attributes:
        name: Of the task.
        kind: Of the task: MultipleChoice, Windows, ...
        kinds: Kind of each metric; the means over groups are not listed.
        measurements: By group ("" is the task) and metric, as ``TaskMetrics.compute`` gives them.
        groups: Group names of documents from coarse to fine, such as ("stem", "astronomy").
        description: What they were measured on.
    """

    name: str
    kind: str
    kinds: Mapping[str, Aggregate]
    measurements: Mapping[str, Mapping[str, Measurement]]
    groups: tuple[tuple[str, ...], ...]
    description: Description

    @property
    def of_task(self) -> Mapping[str, Measurement]:
        """Measurements of the task as a whole, its own before the comparisons of models."""
        found = self.measurements.get("", {})
        return dict(sorted(found.items(), key=lambda item: item[0] in COMPARISONS))

    def is_share(self, metric: str) -> bool:
        """Whether it is a share of documents or tokens: every mean but the KL divergence."""
        return self.kinds.get(metric, "mean") == "mean" and metric != "kl"

    def first_of(self, *, share: bool) -> str | None:
        """The first metric of the task's own that is a share, or (false) a perplexity; None where there is none."""
        for metric in self.of_task:
            found = self.is_share(metric) if share else self.kinds.get(metric) == "perplexity"
            if found and metric not in COMPARISONS:
                return metric
        return None

    @property
    def documents_per_second(self) -> float | None:
        """Speed of this run: what an interrupted one had finished took it no time; None where that is all."""
        ran = self.description["num_documents"] - self.description.get("num_resumed", 0)
        return ran / self.description["seconds"] if ran > 0 and self.description["seconds"] > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``results.json``."""
        described: dict[str, Any] = dict(self.description)
        reason = described.pop("partial")
        return {
            "task": self.name,
            "kind": self.kind,
            "metrics": _json_of(self.of_task),
            "partial": reason is not None,
            "partial_reason": reason,
            **described,
            "documents_per_second": self.documents_per_second,
            "groups": {group: _json_of(found) for group, found in self.measurements.items() if group},
        }


class Evaluated(Protocol):
    """A task that was evaluated, on every rank."""

    task: Task
    metrics: TaskMetrics

    def description(self) -> Description:
        """What it was measured on; all ranks must call it."""


def task_report(evaluated: Evaluated) -> TaskReport:
    """Put together what all ranks measured; all must call it, and all get the same."""
    metrics, task = evaluated.metrics, evaluated.task
    found = metrics.compute()
    return TaskReport(task.name, type(task).__name__, metrics.kinds, found, metrics.groups, evaluated.description())


def task_scalars(reports: Iterable[TaskReport]) -> dict[str, float]:
    """Value and standard error of every metric, by "task/metric" and "task/group/metric" (shares from 0 to 1)."""
    found = {}
    for report in reports:
        for group, measured in report.measurements.items():
            for metric, (value, stderr, *_) in measured.items():
                name = "/".join(part for part in (report.name, group, metric) if part)
                found[name] = value
                if stderr is not None:
                    found[f"{name}_stderr"] = stderr
    return found


def _json_of(found: Mapping[str, Measurement]) -> dict[str, dict[str, Any]]:
    return {metric: measured._asdict() for metric, measured in found.items()}
