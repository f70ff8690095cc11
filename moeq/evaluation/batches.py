"""Documents cut into batches, for each rank its own: together they are all documents, each once.

Documents that begin alike (with the same examples) stand together, the largest first, so that what they share is
computed once and little is padded.  A document joins a batch while the passes of the cheapest plan stay within a
budget of tokens, and while that is cheaper than a batch of its own.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moeq.scoring.pass_cost import Extent, Layout, extent_of, num_common
from moeq.tasks.documents import Document

# Documents that share fewer tokens at their beginning are sorted by size alone.
SHARED_TOKENS = 32
# What one more batch costs, in tokens: less padding than this is accepted.
BATCH_TOKENS = 256
# Keys and values are held for the tokens that rows share, too, for each row; they may be this many times the budget.
HELD_PER_COMPUTED = 8
# Activations of larger passes leave the caches of a processor: 1024 tokens were 1.2 times as fast as 8192.
CPU_PASS_TOKENS = 1024


@dataclass(frozen=True)
class _Sized:
    document: Document
    extent: Extent


def batches(
    documents: Sequence[Document],
    batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    pass_tokens: int | None = None,
    without: Collection[Layout] = (),
) -> list[list[Document]]:
    """This rank's documents, in batches.

    Args:
        documents: All documents of a task, on every rank the same.
        batch_tokens: Tokens that a pass may compute, padding included; a document that alone is more is a batch too.
        rank: Of this process.
        world_size: Number of processes.
        pass_tokens: Tokens of a pass beyond which the device gains nothing (CPU_PASS_TOKENS); None is the budget. What
            the documents of a batch share still is computed for as many of them as it pays for.
        without: Layouts in which batches are not going to run.

    Raises:
        ValueError: The budget is no positive number.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens ({batch_tokens}) must be positive; choose 16384 or what fits into memory")
    empty = [document for document in documents if not document.requests]
    sized = [_Sized(document, extent_of(document.requests)) for document in documents if document.requests]
    mine = [document for group in _groups(sized, without) for document in group][rank::world_size]
    cut = _cut(mine, batch_tokens, min(batch_tokens, pass_tokens or batch_tokens), without)
    # Nothing is computed for a document without requests (an empty text).
    if empty[rank::world_size]:
        cut.append(empty[rank::world_size])
    return cut


def _groups(sized: Sequence[_Sized], without: Collection[Layout]) -> list[list[_Sized]]:
    """Documents that begin alike, and the others; the largest first, within groups and of groups."""
    groups: list[list[_Sized]] = []
    alone: list[_Sized] = []
    for each in sorted(sized, key=lambda each: each.extent.row):
        if groups and num_common(groups[-1][-1].extent.row, each.extent.row) >= SHARED_TOKENS:
            groups[-1].append(each)
        else:
            groups.append([each])
    alone = [group[0] for group in groups if len(group) == 1]
    groups = [group for group in groups if len(group) > 1]
    for group in (*groups, alone):
        group.sort(key=lambda each: _size(each, without), reverse=True)
    groups.sort(key=lambda group: _size(group[0], without), reverse=True)
    return [*groups, alone]


def _size(each: _Sized, without: Collection[Layout]) -> tuple[int, int]:
    # Of documents of one size the first comes first.
    return _cost(each.extent, without), -each.document.index


def _cut(
    sized: Sequence[_Sized], batch_tokens: int, pass_tokens: int, without: Collection[Layout]
) -> list[list[Document]]:
    cut: list[list[Document]] = []
    together: Extent | None = None
    for each in sized:
        joined = each.extent if together is None else together | each.extent
        if together is None or not _fits(joined, batch_tokens, pass_tokens, without) or _cost(joined, without) > (
            _cost(together, without) + _cost(each.extent, without) + BATCH_TOKENS
        ):  # fmt: skip
            joined = each.extent
            cut.append([])
        cut[-1].append(each.document)
        together = joined
    return cut


def _cost(extent: Extent, without: Collection[Layout]) -> int:
    return extent.costs()[extent.cheapest(without)]


def _fits(extent: Extent, batch_tokens: int, pass_tokens: int, without: Collection[Layout]) -> bool:
    layout = extent.cheapest(without)
    shared = extent.common if layout == "prefix" else 0
    largest = min(batch_tokens, max(pass_tokens, HELD_PER_COMPUTED * shared))
    return max(extent.passes()[layout]) <= largest and extent.held <= HELD_PER_COMPUTED * batch_tokens
