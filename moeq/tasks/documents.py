"""Documents (rows of a task as token ids) and their results: the units that are batched, shared by ranks and kept."""

from dataclasses import dataclass, field
from typing import Any

from moeq.tasks.task import DataRow, Values


@dataclass(frozen=True)
class Request:
    """One continuation to score: log P(continuation | context), both as token ids, already cut to the model's window.

    Attributes:
        context: Never empty: where there is no text, the begin- or end-of-text token.
        continuation: Never empty.  The model sees context + continuation without its last token.
        open_end: The last token goes in too, and two models are also compared after it (windows of text).
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    open_end: bool = False


@dataclass(frozen=True)
class Document:
    """A row that is ready for the model.

    Attributes:
        index: Number of the document in its task, from 0, as in the harness.
        key: Hash of everything that determines its result but the model: token ids, and how it is scored.
        row: The row it came from.
        groups: Names of the groups it counts for besides the task.
        requests: Continuations to score.  For generation the one request is the prompt and the right text.
        num_cut: Tokens that were cut from the left, as it was longer than the model's window.
    """

    index: int
    key: str
    row: DataRow
    groups: tuple[str, ...]
    requests: tuple[Request, ...]
    num_cut: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests."""
        return sum(len(request.context) + len(request.continuation) for request in self.requests)


@dataclass(frozen=True)
class Result:
    """What came out of a document: plain data, as it is kept on disk.

    Attributes:
        index: ``Document.index``.
        key: ``Document.key``.
        groups: ``Document.groups``.
        values: Total and weight by metric; compared models add ``kl``, ``top1_agreement`` and ``router_agreement``.
        details: What a person wants to see later: log-likelihoods, the text that was written, the verdict on it.
    """

    index: int
    key: str
    groups: tuple[str, ...]
    values: Values
    details: dict[str, Any] = field(default_factory=dict)
