"""Number of tokens that the layouts of a batch compute, from a few sizes of each of its documents.

A request is seen by the model as the row ``context + continuation[:-1]``.  Rows that are equal, or begin another, are
that row.  With R rows of at most M tokens that all begin with C tokens, D documents whose rows begin with at most S
tokens, and Q rows that go on for at most T tokens after those of their document:

    plain  R M        prefix  C + R (M - C)        document  D S + Q T        tree  D P

where P is the most tokens that the rows of a document are, those that they begin with counted once.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moeq.tasks.documents import Request

Layout = Literal["plain", "prefix", "tree", "document"]
Ids = tuple[int, ...]
# What a second pass costs besides its tokens, in tokens.
PASS_TOKENS = 64
# A tree's attention has a mask of its tokens squared: trees of many branches cost more than they save.
TREE_PER_ROW = 4


@dataclass(frozen=True)
class Extent:
    """Sizes of a set of documents, from which the costs of its layouts follow; ``a | b`` is that of both together.

    Attributes:
        row: One of the rows.
        common: Tokens that all rows begin with.
        rows: Rows that are neither equal to nor the beginning of another of the same document.
        longest: Tokens of the longest row.
        documents: Documents.
        stem: Tokens that all rows of a document begin with, in the document that has the most.
        least_stem: The same in the document that has the fewest.
        branches: Rows that are more than that.
        branch: The longest such rest.
        tree: Tokens of all rows of a document, the stem counted once, in the document that has the most.
    """

    row: Ids
    common: int
    rows: int
    longest: int
    documents: int
    stem: int
    least_stem: int
    branches: int
    branch: int
    tree: int

    def __or__(self, other: "Extent") -> "Extent":
        common = min(self.common, other.common)
        return Extent(
            self.row,
            num_common(self.row[:common], other.row[:common]),
            self.rows + other.rows,
            max(self.longest, other.longest),
            self.documents + other.documents,
            max(self.stem, other.stem),
            min(self.least_stem, other.least_stem),
            self.branches + other.branches,
            max(self.branch, other.branch),
            max(self.tree, other.tree),
        )

    def passes(self) -> dict[Layout, tuple[int, ...]]:
        """Tokens of each pass of each possible layout."""
        passes: dict[Layout, tuple[int, ...]] = {"plain": (self.rows * self.longest,)}
        if self.common and self.common < self.longest:
            passes["prefix"] = self.common, self.rows * (self.longest - self.common)
        if self.least_stem and self.branches:
            if self.tree <= TREE_PER_ROW * self.longest:
                passes["tree"] = (self.documents * self.tree,)
            passes["document"] = self.documents * self.stem, self.branches * self.branch
        return passes

    def costs(self) -> dict[Layout, int]:
        """Tokens that each possible layout computes; of equal ones the first is the simplest."""
        return {layout: sum(tokens) + PASS_TOKENS * (len(tokens) - 1) for layout, tokens in self.passes().items()}

    def cheapest(self, without: Collection[Layout] = ()) -> Layout:
        """The cheapest layout that is not in ``without``; "plain" always is possible."""
        costs = {layout: cost for layout, cost in self.costs().items() if layout not in without}
        return min(costs, key=costs.__getitem__)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are held at once."""
        return self.rows * self.longest


def extent_of(requests: Iterable[Request]) -> Extent:
    """Sizes of one document, given by its requests (at least one)."""
    rows, _ = distinct_rows([row_of(request) for request in requests])
    stem = num_common(rows[0], rows[-1])
    longest = max(map(len, rows))
    branches = sum(len(row) > stem for row in rows)
    tree = stem + sum(len(row) - stem for row in rows)
    return Extent(rows[0], stem, len(rows), longest, 1, stem, stem, branches, longest - stem, tree)


def row_of(request: Request) -> Ids:
    """What the model sees of a request."""
    return request.context + (request.continuation if request.open_end else request.continuation[:-1])


def num_common(a: Ids, b: Ids) -> int:
    """Tokens at the beginning of both."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return bisect_left(range(1, length + 1), True, key=lambda n: a[:n] != b[:n])


def distinct_rows(rows: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """Rows that do not begin another one, in descending order, and for each given row the one that it begins."""
    distinct: list[Ids] = []
    index = [0] * len(rows)
    # In descending order the row before one that begins others is one of those.
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not distinct or distinct[-1][: len(rows[i])] != rows[i]:
            distinct.append(rows[i])
        index[i] = len(distinct) - 1
    return distinct, index
