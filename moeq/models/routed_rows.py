"""Which tokens chose which routed expert, expert after expert.

One sort serves all experts of a block, and its result is looked at once: asking each expert for its tokens makes a GPU
wait for the host as often as there are experts.

Legend: T tokens, K experts per token, N tokens times the experts they chose, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutedRows:
    """The choices of one call of an experts module, sorted by expert and for one expert in the order of the tokens.

    Attributes:
        tokens_N: int64, index of the token.
        slots_N: int64, as which of its K choices (0..K-1) it chose the expert.
        starts: E + 1 numbers: those of expert e are in [starts[e], starts[e + 1]).
    """

    tokens_N: Tensor
    slots_N: Tensor
    starts: list[int]

    def parts(self) -> Iterator[tuple[int, slice]]:
        """For each expert that is hit: its index, and where its choices are."""
        for expert, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if stop > start:
                yield expert, slice(start, stop)


def sort_by_expert(ids_TK: Tensor, num_experts: int, keep_T: Tensor | None = None) -> RoutedRows:
    """Sort the choices of a batch.

    Args:
        ids_TK: Chosen experts; an index of ``num_experts`` or more (a slot of another rank) counts for none.
        num_experts: E.
        keep_T: bool; the tokens that count, None for all.
    """
    if keep_T is not None:
        ids_TK = ids_TK.masked_fill(~keep_T[:, None], num_experts)
    sorted_N, order_N = torch.sort(ids_TK.flatten(), stable=True)
    experts_E = torch.arange(num_experts + 1, dtype=sorted_N.dtype, device=sorted_N.device)
    starts: list[int] = torch.searchsorted(sorted_N, experts_E).tolist()
    order_N = order_N[: starts[-1]]
    num_slots = ids_TK.shape[1]
    return RoutedRows(order_N // num_slots, order_N % num_slots, starts)


def routed_tokens(ids_TK: Tensor, num_experts: int, keep_T: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that is hit: its index, its token indices and the slot (0..K-1) in which each chose it."""
    rows = sort_by_expert(ids_TK, num_experts, keep_T)
    for expert, part in rows.parts():
        yield expert, rows.tokens_N[part], rows.slots_N[part]
