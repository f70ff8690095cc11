"""Evaluation tasks as declarative descriptions, from which everything else follows.

A task names its data (``Source``), how a row becomes text, and how what the model did with that text becomes numbers.
There are four kinds, by what is asked of the model:

- ``MultipleChoice`` (and ``Cloze``, ``LastWord``): log-likelihoods of continuations of a context;
- ``Windows``: log-likelihood of windows of a running text, all of one length;
- ``Rolling``: log-likelihood of whole documents, in as few windows of the model as they need;
- ``Generation`` (and ``Code``): text that the model writes after a prompt.

A row's numbers are ``Values``: a total and a weight per metric.  A metric of a task is the quotient of the summed
totals and weights of its documents, seen through its ``Aggregate``; so sums over documents, batches and ranks are
exact, in any order.  Nothing here reads files, tokenizes or runs a model.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

DataRow = Mapping[str, Any]
Values = dict[str, tuple[float, float]]
# mean: total / weight; perplexity: exp of it (totals in nats); bits: it in bits instead of nats.
Aggregate = Literal["mean", "perplexity", "bits"]
ShotSampler = Literal["first", "random"]
ROLLING_METRICS: dict[str, Aggregate] = {
    "word_perplexity": "perplexity",
    "byte_perplexity": "perplexity",
    "bits_per_byte": "bits",
}


class Outcome(NamedTuple):
    """What the model says of one continuation: log P(continuation | context) in nats, and whether it is the argmax."""

    loglikelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Source:
    """Where the rows are: ``<data_dir>/<folder>/<split>.jsonl`` (``.txt``, also ``.gz``), or a data set of the hub.

    Attributes:
        folder: Folder below ``data_dir``.
        hub: Id of the data set on the hub; None where it has no copy there.
        config: Its configuration there.
        hub_file: The one file of the data set there that is the split, where that is a part of a large one.
        splits: The first of these that exists is evaluated; which one it was is in the results.  Names of splits, or of
            files.
        shots: Split of the few-shot examples, or a part of it as in "prompt[1:4]"; None where the task has none.
        whole: A .txt file is one row; otherwise each of its lines is one.
    """

    folder: str
    hub: str | None
    config: str | None = None
    hub_file: str | None = None
    splits: tuple[str, ...] = ("validation",)
    shots: str | None = None
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds share.

    Attributes:
        name: Name in configurations and results.
        source: Its data.
        metrics: Kind of each metric, in the order of the tables.
        prepare: From the rows as they are stored to the documents (pages from lines, say).
        groups: Names of the groups that a row counts for besides the task itself, such as its subject.
        documents: How many documents the task is defined on, evenly spread over the rows; None is all of them.
        num_shots: Few-shot examples in front of each prompt.
        shot_sampler: "first" takes the first rows of the split, "random" draws anew for each document, seeded.
        shots_like: Examples are taken from the rows for which this equals the document's (its subject, say).
        description: Text in front of the examples.
    """

    name: str
    source: Source
    metrics: Mapping[str, Aggregate]
    prepare: Callable[[Sequence[DataRow]], Sequence[DataRow]] = lambda rows: rows
    groups: Callable[[DataRow], tuple[str, ...]] = lambda row: ()
    documents: int | None = None
    num_shots: int = 0
    shot_sampler: ShotSampler = "first"
    shots_like: Callable[[DataRow], Any] = lambda row: None
    description: Callable[[DataRow], str] = lambda row: ""

    def shot(self, row: DataRow) -> str:
        """A row as an example; raises ValueError for kinds that have no prompts."""
        raise ValueError(f"task {self.name} ({type(self).__name__}) takes no examples; set num_shots to 0")


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """Continuations of one context, the most likely of which is the model's answer.

    ``acc`` compares log-likelihoods; ``acc_norm`` divides them by the number of characters of the choice first.

    Attributes:
        context: Text that all choices continue.
        choices: The choices, without the delimiter.
        answer: Index of the right one.
        delimiter: Between context and choice.
        shot_delimiter: The same in examples; None is ``delimiter``.
    """

    context: Callable[[DataRow], str]
    choices: Callable[[DataRow], Sequence[str]]
    answer: Callable[[DataRow], int]
    delimiter: str = " "
    shot_delimiter: str | None = None
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: {"acc": "mean", "acc_norm": "mean"})

    def pairs(self, row: DataRow, shots: str = "") -> list[tuple[str, str]]:
        """(context, continuation) of each choice; ``shots`` is the text of the examples."""
        return [(shots + self.context(row), self.delimiter + choice) for choice in self.choices(row)]

    def shot(self, row: DataRow) -> str:
        """A row as an example: its context and its right choice."""
        delimiter = self.delimiter if self.shot_delimiter is None else self.shot_delimiter
        return self.context(row) + delimiter + self.choices(row)[self.answer(row)]

    def score(self, row: DataRow, outcomes: Sequence[Outcome]) -> Values:
        """Values of one document; of equal log-likelihoods the first counts, as in numpy's argmax."""
        likelihoods = [outcome.loglikelihood for outcome in outcomes]
        # An empty choice never wins.
        by_length = [
            x / len(choice) if choice else -math.inf for x, choice in zip(likelihoods, self.choices(row), strict=True)
        ]
        answer = self.answer(row)
        right = {"acc": likelihoods, "acc_norm": by_length}
        return {name: (float(right[name].index(max(right[name])) == answer), 1.0) for name in self.metrics}


@dataclass(frozen=True, kw_only=True)
class Cloze(MultipleChoice):
    """The other way round: the choices are contexts (a sentence up to its blank, filled), the ending is the same.

    ``choices`` are the filled contexts, ``ending`` is what is scored after each; ``context`` is not used.
    """

    context: Callable[[DataRow], str] = lambda row: ""
    ending: Callable[[DataRow], str]
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: {"acc": "mean"})

    def pairs(self, row: DataRow, shots: str = "") -> list[tuple[str, str]]:
        """(filled context, ending) of each choice."""
        return [(shots + choice, self.delimiter + self.ending(row)) for choice in self.choices(row)]

    def shot(self, row: DataRow) -> str:
        """A row as an example: the rightly filled sentence."""
        return self.choices(row)[self.answer(row)] + self.delimiter + self.ending(row)


@dataclass(frozen=True, kw_only=True)
class LastWord(Task):
    """One continuation: how likely it is, and whether greedy decoding finds it."""

    context: Callable[[DataRow], str]
    target: Callable[[DataRow], str]
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: {"perplexity": "perplexity", "acc": "mean"})

    def pairs(self, row: DataRow, shots: str = "") -> list[tuple[str, str]]:
        """The one (context, continuation)."""
        return [(shots + self.context(row), self.target(row))]

    def shot(self, row: DataRow) -> str:
        """A row as an example."""
        return self.context(row) + self.target(row)

    def score(self, row: DataRow, outcomes: Sequence[Outcome]) -> Values:
        """Values of one document; its perplexity counts once however many tokens the word has, as in the harness."""
        (outcome,) = outcomes
        return {"perplexity": (-outcome.loglikelihood, 1.0), "acc": (float(outcome.is_greedy), 1.0)}


@dataclass(frozen=True, kw_only=True)
class Windows(Task):
    """Perplexity of windows of one length, each of whose tokens but the first is predicted from those before it.

    Attributes:
        text: Text of a row.
        join: Text between two rows of the running text; None ends each with the end-of-text token instead.
        special_tokens: Whether the tokenizer adds its own to the whole text (a first token, say), as GPTQ's protocol
            does.
        random_windows: Instead of cutting the running text: this many windows of random rows at random places, each
            from a row that is longer than a window (GPTQ's protocol for C4).
        seed: Of the random windows.
        length: Tokens of a window; None is the window length of the run.
    """

    text: Callable[[DataRow], str] = lambda row: str(row["text"])
    join: str | None = None
    special_tokens: bool = False
    random_windows: int | None = None
    seed: int = 0
    length: int | None = None
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: {"perplexity": "perplexity"})


@dataclass(frozen=True, kw_only=True)
class Rolling(Task):
    """Log-likelihood of every token of a document, per word and per byte.

    Attributes:
        text: Text that is scored.
        original: Text whose words and bytes are counted.
    """

    text: Callable[[DataRow], str]
    original: Callable[[DataRow], str]
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: dict(ROLLING_METRICS))

    def score(self, row: DataRow, loglikelihood: float) -> Values:
        """Values of one document, in nats."""
        original = self.original(row)
        # Not str.split: the harness counts the empty words before a leading and after a trailing blank, too.
        num_words, num_bytes = len(re.split(r"\s+", original)), len(original.encode())
        weights = {"word_perplexity": num_words, "byte_perplexity": num_bytes, "bits_per_byte": num_bytes}
        return {name: (-loglikelihood, float(weights[name])) for name in self.metrics}


@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """Text written after a prompt.

    Attributes:
        prompt: Text to continue.
        target: The text that would be right: examples end with it, and compared models are compared along it.
        stop: A continuation ends before the first of these.
        max_new_tokens: ... or after so many tokens.
        score_text: Values from the continuation.
    """

    prompt: Callable[[DataRow], str]
    target: Callable[[DataRow], str]
    stop: tuple[str, ...]
    max_new_tokens: int
    score_text: Callable[[DataRow, str], Values]

    def shot(self, row: DataRow) -> str:
        """A row as an example."""
        return self.prompt(row) + self.target(row)


@dataclass(frozen=True, kw_only=True)
class Code(Generation):
    """A program that has to pass tests; several samples of it give pass@k.

    Attributes:
        program: Everything that is run for a continuation: it passes when it ends without an error.
    """

    program: Callable[[DataRow, str], str]
    score_text: Callable[[DataRow, str], Values] = lambda row, text: {}
    metrics: Mapping[str, Aggregate] = field(default_factory=lambda: {"pass@1": "mean"})
