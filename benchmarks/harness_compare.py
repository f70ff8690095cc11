"""What is equal between moeq and lm-evaluation-harness on the same documents, and what is not.

Two log-likelihoods x are equal when they differ by at most ``TOLERANCE * max(1, |x|)``: both sides compute in float32,
in batches of different shapes.  The best choice of a document is then known to both unless the two best are closer than
twice that (identical choices, say): such a document ties in that metric, and is excepted from the equality of metrics,
not from that of log-likelihoods.  Accuracies and their standard errors equal to the last bits where no tie went two
ways.  What is stated but not compared: standard errors of perplexities (the harness draws bootstrap samples for LAMBADA
and has none for texts) and of MMLU's groups (the harness pools those of the subjects).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness_sides import Scored, Side

from moeq.tasks.spec import Kind, MultipleChoice, Task

TOLERANCE = 1e-5
ROUNDING = 1e-12


class Tie(NamedTuple):
    """A document whose best choice is not known to the tolerance.

    Attributes:
        name: Task or subject.
        index: Number of the document there.
        metric: "acc" or "acc_norm".
        gap: Between the two best choices; of "acc_norm" per character.
        agreed: Whether both sides came to the same value all the same.
    """

    name: str
    index: int
    metric: str
    gap: float
    agreed: bool


@dataclass(frozen=True)
class Comparison:
    """A task on both sides.

    Attributes:
        documents: How many.
        continuations: How many log-likelihoods.
        num_cut: Documents that were cut to the model's window.
        difference: Largest between two log-likelihoods, in nats.
        relative: The same divided by ``max(1, |x|)``.
        ties: Documents that are excepted.
        problems: Everything that should be equal and is not.
        measured: (value, standard error) of both sides, by task or group and metric.
    """

    documents: int
    continuations: int
    num_cut: int
    difference: float
    relative: float
    ties: tuple[Tie, ...]
    problems: tuple[str, ...]
    measured: dict[str, dict[str, dict[str, tuple[float, float | None]]]]


def compare(task: Task, ours: Side, theirs: Side) -> Comparison:
    """Compare every document and every metric."""
    pairs, problems = [], []
    for name in sorted(ours.documents.keys() | theirs.documents.keys()):
        own, other = ours.documents.get(name, []), theirs.documents.get(name, [])
        if len(own) != len(other):
            problems.append(f"{name}: {len(own)} documents, the harness has {len(other)}")
        pairs += [(name, index, *pair) for index, pair in enumerate(zip(own, other, strict=False))]
    ties = [tie for pair in pairs for tie in _ties(task, *pair)]
    excepted = {(tie.name, tie.index, tie.metric) for tie in ties}
    for name, index, own, other in pairs:
        for problem in _differences(task.metrics, own, other, {m for n, i, m in excepted if (n, i) == (name, index)}):
            problems.append(f"{name}, document {index}: {problem}")
    split = {(tie.name, tie.metric) for tie in ties if not tie.agreed}
    problems += _metric_differences(task.metrics, ours, theirs, split)
    both = [(x, y) for _, _, own, other in pairs for x, y in zip(own.likelihoods, other.likelihoods, strict=False)]
    return Comparison(
        documents=len(pairs),
        continuations=len(both),
        num_cut=sum(own.num_cut > 0 for _, _, own, _ in pairs),
        difference=max((abs(x - y) for x, y in both), default=0.0),
        relative=max((abs(x - y) / max(1.0, abs(y)) for x, y in both), default=0.0),
        ties=tuple(ties),
        problems=tuple(problems),
        measured={
            name: {
                metric: {"moeq": ours.measured[name][metric], "harness": theirs.measured[name][metric]}
                for metric in task.metrics
            }
            for name in theirs.measured
            if name in ours.measured
        },
    )


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= TOLERANCE * max(1.0, abs(y))


def _ties(task: Task, name: str, index: int, own: Scored, other: Scored) -> Iterator[Tie]:
    if not isinstance(task, MultipleChoice):
        return
    for metric in task.metrics:
        divisors = own.lengths if metric == "acc_norm" else (1,) * len(own.lengths)
        # Value and uncertainty of each choice; an empty one never wins.
        scored = [
            (x / divisor, TOLERANCE * max(1.0, abs(x)) / divisor)
            for x, divisor in zip(other.likelihoods, divisors, strict=False)
            if divisor
        ]
        best, second = sorted(scored, reverse=True)[:2]
        if best[0] - second[0] <= best[1] + second[1]:
            yield Tie(name, index, metric, best[0] - second[0], own.values[metric] == other.values[metric])


def _differences(kinds: Mapping[str, Kind], own: Scored, other: Scored, ties: set[str]) -> Iterator[str]:
    """What differs in one document."""
    if len(own.likelihoods) != len(other.likelihoods):
        yield f"{len(own.likelihoods)} continuations, the harness has {len(other.likelihoods)}"
    for number, (x, y) in enumerate(zip(own.likelihoods, other.likelihoods, strict=False)):
        if not _close(x, y):
            yield f"continuation {number} has log-likelihood {x:.6f}, in the harness {y:.6f}"
    for metric, kind in kinds.items():
        (total, weight), (their_total, their_weight) = own.values[metric], other.values[metric]
        same = total == their_total if kind == "mean" else _close(total, their_total)
        if weight != their_weight or (not same and metric not in ties):
            yield f"{metric} is {total:g} of {weight:g}, in the harness {their_total:g} of {their_weight:g}"


def _metric_differences(
    kinds: Mapping[str, Kind], ours: Side, theirs: Side, split: set[tuple[str, str]]
) -> Iterator[str]:
    """What differs in the metrics of tasks and groups."""
    for name, found in theirs.measured.items():
        for metric, kind in kinds.items():
            if name not in ours.measured:
                yield f"{name}: measured by the harness only"
                continue
            (value, stderr), (their_value, their_stderr) = ours.measured[name][metric], found[metric]
            if kind == "perplexity":
                value, their_value = math.log(value), math.log(their_value)
            is_leaf = name in theirs.documents
            # In groups of subjects one tie that went two ways is enough.
            if (name, metric) in split or (not is_leaf and any(metric == tied for _, tied in split)):
                continue
            if abs(value - their_value) > (ROUNDING if kind == "mean" else TOLERANCE * max(1.0, abs(their_value))):
                yield f"{name}: {metric} is {found[metric][0]:.8g} in the harness, {ours.measured[name][metric][0]:.8g}"
            if kind == "mean" and is_leaf and not _same_error(stderr, their_stderr):
                yield f"{name}: standard error of {metric} is {stderr}, in the harness {their_stderr}"


def _same_error(x: float | None, y: float | None) -> bool:
    return x == y if x is None or y is None else abs(x - y) <= ROUNDING


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain data."""
    return {**vars(comparison), "ties": [tie._asdict() for tie in comparison.ties]}
