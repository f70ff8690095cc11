"""Plan of the forward passes of a batch of requests, which compute no token twice as far as two passes can.

A request is seen by the model as the row ``context + continuation[:-1]``.  Rows that are equal, or begin another, are
that row (the choices of a question whose answers are single tokens are one row with several targets).  The rest is laid
out in whichever of four ways computes the fewest tokens, padding included:

    plain      [row, padding] for each row
    prefix     [tokens that all rows begin with], once; then [rest, padding] for each row
    tree       [tokens that all rows of a document begin with, rest, rest, .., padding] for each document
    document   [padding, tokens that all rows of a document begin with]; then [rest, padding] for each row

where a second pass continues the cache of the first.  So few-shot text that the documents of a batch share is computed
once per batch, and the context of a question once for all of its choices.  In a tree, each rest has the positions that
follow the stem, and attends to the stem and to itself: that needs attention that takes any mask.  The other layouts
suit recurrent layers, too: padding is never between two tokens of a row, and at the right no token sees it.

The order of what is predicted is that of the requests and their tokens, whatever the layout.

Shapes: B rows of a pass, L its columns, K positions whose logits are computed, N predicted tokens, S spans of tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from moeq.scoring.pass_cost import Extent, Ids, Layout, distinct_rows, extent_of, num_common, row_of
from moeq.tasks.documents import Request

IGNORED = -100


@dataclass(frozen=True)
class Segment:
    """One forward pass.

    Attributes:
        ids_BL: int64 token ids; padding is 0.
        length_B: Tokens of each row.
        pad_left: Whether padding is at the left; else it is at the right.
        parent_B: Row of the pass before that each row continues; None in the first pass.
        read_K: Positions of the flattened [B * L] whose logits are needed.
        branch_BL: In a tree, 0 in the stem and at padding, and the number of the rest, from 1, in a rest.
        position_BL: In a tree, the position of each token in its own row.
    """

    ids_BL: Tensor
    length_B: Tensor
    pad_left: bool
    parent_B: Tensor | None
    read_K: Tensor
    branch_BL: Tensor | None = None
    position_BL: Tensor | None = None


class Spans(NamedTuple):
    """Which of the computed tokens a document consists of: its requests' rows, each as if it had been run alone.

    A token that several requests share belongs to each of them, so that counts over the spans of a document depend
    neither on the layout nor on the other documents of the batch.  Positions are those of the flattened passes, one
    after the other, as ``moeq.scoring.routing.record_routing`` concatenates them; padding is in no span.
    """

    start_S: Tensor
    stop_S: Tensor
    owner_S: Tensor


@dataclass(frozen=True)
class Plan:
    """Forward passes of a batch, and where in them each predicted token is.

    Attributes:
        layout: See the module.
        requests: What it was made from.
        owners: Number of the document of each request.
        segments: One or two passes; none where there are no requests.
        source_N: Position among the logits of all passes, concatenated along K, that predicts token n.
        targets_N: Token n; -100 where two models are compared and no token is scored.
        request_N: Number of its request.
        owner_N: Number of its document.
        spans: Tokens of each document.
    """

    layout: Layout
    requests: tuple[Request, ...]
    owners: tuple[int, ...]
    segments: tuple[Segment, ...]
    source_N: Tensor
    targets_N: Tensor
    request_N: Tensor
    owner_N: Tensor
    spans: Spans

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return sum(segment.ids_BL.numel() for segment in self.segments)


def plan_requests(
    requests: Sequence[Request],
    owners: Sequence[int],
    layout: Layout | None = None,
    without: Collection[Layout] = (),
) -> Plan:
    """The cheapest passes for requests that run together.

    Args:
        requests: Any number of them; several may be equal.
        owners: Number of the document of each request, from 0.
        layout: This one instead of the cheapest.
        without: The cheapest except for these.
    """
    by_owner: dict[int, list[Request]] = {}
    for request, owner in zip(requests, owners, strict=True):
        by_owner.setdefault(owner, []).append(request)
    if layout is None:
        layout = reduce(Extent.__or__, map(extent_of, by_owner.values())).cheapest(without) if requests else "plain"
    rows, row_of_R = distinct_rows([row_of(request) for request in requests])
    owner_of = [owner for _, owner in sorted(dict(zip(row_of_R, owners, strict=True)).items())]
    stem_lengths = _stem_lengths(rows, row_of_R, owners, owner_of, layout)
    segments, place_B = (
        _trees(rows, stem_lengths, owner_of) if rows and layout == "tree" else _segments(rows, stem_lengths)
    )
    return _with_predictions(layout, tuple(requests), tuple(owners), segments, place_B, row_of_R)


def _stem_lengths(
    rows: list[Ids], row_of_R: list[int], owners: Sequence[int], owner_of: Sequence[int], layout: Layout
) -> list[int]:
    """How many tokens of each row are computed once for several rows."""
    if layout == "plain" or not rows:
        return [0] * len(rows)
    if layout == "prefix":
        return [num_common(rows[0], rows[-1])] * len(rows)
    rows_of: dict[int, list[Ids]] = {}
    for number, owner in zip(row_of_R, owners, strict=True):
        rows_of.setdefault(owner, []).append(rows[number])
    stem_of = {owner: num_common(min(own), max(own)) for owner, own in rows_of.items()}
    return [stem_of[owner] for owner in owner_of]


class _Place(NamedTuple):
    """Where a row's tokens are in the flattened passes: first those from ``stem`` on, then from ``branch`` on."""

    stem: int
    num_stem: int
    branch: int

    def at(self, position: int) -> int:
        return self.stem + position if position < self.num_stem else self.branch + position - self.num_stem


def _segments(rows: list[Ids], stem_lengths: list[int]) -> tuple[list[Segment], list[_Place]]:
    """The passes without what is read in them, and the place of each row."""
    if not rows:
        return [], []
    if not any(stem_lengths):
        ids_BL, length_B, start_B = _padded(rows, left=False)
        places = [_Place(0, 0, start) for start in start_B]
        return [Segment(ids_BL, length_B, False, None, torch.empty(0, dtype=torch.int64))], places
    stems: dict[Ids, int] = {}
    parents = [stems.setdefault(row[:length], len(stems)) for row, length in zip(rows, stem_lengths, strict=True)]
    nothing = torch.empty(0, dtype=torch.int64)
    ids_BL, length_B, stem_start_B = _padded(list(stems), left=True)
    segments = [Segment(ids_BL, length_B, True, None, nothing)]
    branching = [i for i, row in enumerate(rows) if len(row) > stem_lengths[i]]
    branch_start = [0] * len(rows)
    if branching:
        offset = ids_BL.numel()
        ids_BL, length_B, start_B = _padded([rows[i][stem_lengths[i] :] for i in branching], left=False)
        segments.append(Segment(ids_BL, length_B, False, torch.tensor([parents[i] for i in branching]), nothing))
        for i, start in zip(branching, start_B, strict=True):
            branch_start[i] = offset + start
    places = [
        _Place(stem_start_B[parent], length, branch)
        for parent, length, branch in zip(parents, stem_lengths, branch_start, strict=True)
    ]
    return segments, places


def _trees(rows: list[Ids], stem_lengths: list[int], owner_of: Sequence[int]) -> tuple[list[Segment], list[_Place]]:
    """The one pass of trees, a row per document, without what is read in it, and the place of each given row."""
    rows_of: dict[int, list[int]] = {}
    for number, owner in enumerate(owner_of):
        rows_of.setdefault(owner, []).append(number)
    trees: list[Ids] = []
    branches: list[Ids] = []
    positions: list[Ids] = []
    inside: dict[int, int] = {}
    for numbers in rows_of.values():
        num_stem = stem_lengths[numbers[0]]
        tree, branch, position = rows[numbers[0]][:num_stem], (0,) * num_stem, tuple(range(num_stem))
        for i, number in enumerate(numbers, 1):
            inside[number] = len(tree)
            tree += rows[number][num_stem:]
            branch += (i,) * (len(rows[number]) - num_stem)
            position += tuple(range(num_stem, len(rows[number])))
        trees.append(tree)
        branches.append(branch)
        positions.append(position)
    ids_BL, length_B, start_B = _padded(trees, left=False)
    branch_BL, position_BL = (_padded(values, left=False)[0] for values in (branches, positions))
    start_of = dict(zip(rows_of, start_B, strict=True))
    places = [
        _Place(start_of[owner], stem_lengths[number], start_of[owner] + inside[number])
        for number, owner in enumerate(owner_of)
    ]
    nothing = torch.empty(0, dtype=torch.int64)
    return [Segment(ids_BL, length_B, False, None, nothing, branch_BL, position_BL)], places


def _padded(rows: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor, list[int]]:
    """ids_BL, length_B, and where in the flattened ids each row starts."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
    starts = []
    for number, row in enumerate(rows):
        column = longest - len(row) if left else 0
        ids_BL[number, column : column + len(row)] = torch.tensor(row, dtype=torch.int64)
        starts.append(number * longest + column)
    return ids_BL, torch.tensor(lengths), starts


def _with_predictions(
    layout: Layout,
    requests: tuple[Request, ...],
    owners: tuple[int, ...],
    segments: list[Segment],
    places: list[_Place],
    row_of_R: list[int],
) -> Plan:
    """The plan, with what is read in each pass."""
    positions: list[int] = []
    targets: list[int] = []
    numbers: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for number, (request, row, owner) in enumerate(zip(requests, row_of_R, owners, strict=True)):
        place, end = places[row], len(row_of(request))
        predicted = [*request.continuation, *([IGNORED] if request.open_end else [])]
        positions += map(place.at, range(len(request.context) - 1, end))
        targets += predicted
        numbers += [number] * len(predicted)
        num_stem = min(end, place.num_stem)
        spans.append((place.stem, place.stem + num_stem, owner))
        spans.append((place.branch, place.branch + end - num_stem, owner))
    read_K, source_N = torch.unique(torch.tensor(positions, dtype=torch.int64), return_inverse=True)
    finished, offset = [], 0
    for segment in segments:
        end = offset + segment.ids_BL.numel()
        finished.append(replace(segment, read_K=read_K[(read_K >= offset) & (read_K < end)] - offset))
        offset = end
    start_S, stop_S, owner_S = (
        torch.tensor([span for span in spans if span[0] < span[1]], dtype=torch.int64).reshape(-1, 3).unbind(1)
    )
    request_N = torch.tensor(numbers, dtype=torch.int64)
    return Plan(
        layout, requests, owners, tuple(finished), source_N, torch.tensor(targets, dtype=torch.int64), request_N,
        torch.tensor(owners, dtype=torch.int64)[request_N], Spans(start_S, stop_S, owner_S),
    )  # fmt: skip
