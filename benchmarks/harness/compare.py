"""What is equal between moeq and lm-evaluation-harness on the same documents, and what is not.

Two log-likelihoods x are equal when they differ by at most ``TOLERANCE * max(1, |x|)``: both sides compute in float32,
in batches of different shapes.  The best choice of a document is then known to both unless the two best are closer than
twice that (identical choices, say): such a document ties in that metric, and is excepted from the equality of metrics,
not from that of log-likelihoods.  Accuracies and their standard errors equal to the last bits where no tie went two
ways.

Where a log-likelihood differs by more, and one of the document's tokens ties between two experts (a router gap of at
most ``TOLERANCE``, ``routers.py``), the document ties in everything.

What is stated but not compared: standard errors of perplexities (the harness draws bootstrap samples for LAMBADA and
has none for texts) and of MMLU's groups (the harness pools those of the subjects).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.harness.sides import Scored, Side
from moeq.tasks.task import Aggregate, MultipleChoice, Task

TOLERANCE = 1e-5
ROUNDING = 1e-12


# From sequences of tokens to their smallest router gap.
RouterGap = Callable[[Sequence[Sequence[int]]], float]


class Tie(NamedTuple):
    """A document whose best choice, or the expert of one of whose tokens, is not known to the tolerance.

    Attributes:
        name: Task or subject.
        index: Number of the document there.
        metric: "acc" or "acc_norm"; "router" where everything is excepted.
        gap: Between the two best choices; of "acc_norm" per character; of "router" see ``routers.py``.
        difference: Largest between two log-likelihoods, in nats.
        agreed: Whether both sides came to the same value, or values, all the same.
    """

    name: str
    index: int
    metric: str
    gap: float
    difference: float
    agreed: bool


@dataclass(frozen=True)
class Comparison:
    """A task on both sides.

    Attributes:
        documents: How many.
        continuations: How many log-likelihoods.
        num_cut: Documents that were cut to the model's window.
        difference: Largest between two log-likelihoods, in nats, without router ties.
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


class Pair(NamedTuple):
    """A document on both sides."""

    name: str
    index: int
    own: Scored
    other: Scored

    def gaps(self) -> list[tuple[float, float]]:
        """(nats, nats divided by ``max(1, |x|)``) between the log-likelihoods of each continuation."""
        both = zip(self.own.likelihoods, self.other.likelihoods, strict=False)
        return [(abs(x - y), abs(x - y) / max(1.0, abs(y))) for x, y in both]

    def is_alike(self) -> bool:
        """The same continuations and the same weights: what rounding cannot change."""
        weights = [{metric: weight for metric, (_, weight) in side.values.items()} for side in self[2:]]
        return len(self.own.likelihoods) == len(self.other.likelihoods) and weights[0] == weights[1]


def compare(task: Task, ours: Side, theirs: Side, router_gap: RouterGap = lambda _: math.inf) -> Comparison:
    """Compare every document and every metric."""
    pairs, problems = _pairs(ours, theirs)
    ties, split, gaps = [], set(), []
    for pair in pairs:
        of_pair = list(_ties(task, pair))
        found = list(_differences(task.metrics, pair, {tie.metric for tie in of_pair}))
        if found and pair.is_alike() and (gap := router_gap(pair.own.sequences)) <= TOLERANCE:
            of_pair, found = [_tie(pair, "router", gap, pair.own.values == pair.other.values)], []
            split |= {
                (pair.name, metric) for metric in task.metrics if pair.own.values[metric] != pair.other.values[metric]
            }
        else:
            gaps += pair.gaps()
        ties += of_pair
        problems += [f"{pair.name}, document {pair.index}: {problem}" for problem in found]
    split |= {(tie.name, tie.metric) for tie in ties if not tie.agreed}
    problems += _metric_differences(task.metrics, ours, theirs, split)
    return Comparison(
        documents=len(pairs),
        continuations=sum(len(pair.gaps()) for pair in pairs),
        num_cut=sum(pair.own.num_cut > 0 for pair in pairs),
        difference=max((nats for nats, _ in gaps), default=0.0),
        relative=max((relative for _, relative in gaps), default=0.0),
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


def _pairs(ours: Side, theirs: Side) -> tuple[list[Pair], list[str]]:
    """Documents that both sides have, and where they do not have as many."""
    pairs, problems = [], []
    for name in sorted(ours.documents.keys() | theirs.documents.keys()):
        own, other = ours.documents.get(name, []), theirs.documents.get(name, [])
        if len(own) != len(other):
            problems.append(f"{name}: {len(own)} documents, the harness has {len(other)}")
        pairs += [Pair(name, index, *both) for index, both in enumerate(zip(own, other, strict=False))]
    return pairs, problems


def _tie(pair: Pair, metric: str, gap: float, agreed: bool) -> Tie:
    return Tie(pair.name, pair.index, metric, gap, max(nats for nats, _ in pair.gaps()), agreed)


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= TOLERANCE * max(1.0, abs(y))


def _ties(task: Task, pair: Pair) -> Iterator[Tie]:
    own, other = pair.own, pair.other
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
            yield _tie(pair, metric, best[0] - second[0], own.values[metric] == other.values[metric])


def _differences(kinds: Mapping[str, Aggregate], pair: Pair, ties: set[str]) -> Iterator[str]:
    """What differs in one document."""
    own, other = pair.own, pair.other
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
    kinds: Mapping[str, Aggregate], ours: Side, theirs: Side, split: set[tuple[str, str]]
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
