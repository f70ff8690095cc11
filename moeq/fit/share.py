"""Work and results of a pass among ranks: which solves what, and how every rank gets all of it.

Work is measured in floating-point operations of GPTQ, which other methods share up to a factor: a weight [O, I] takes

    I^3 / 3 for the factor of its Hessian  +  O I^2 for the feedback  +  O I^2 for the energy of its output.

A stack of experts is cut at a fixed amount of work, whatever the number of ranks: so the stacks, and with them the
codes on any device, do not depend on it.  Units then go one after another, the most expensive first, to the rank with
the least work so far, which is at most 4/3 of the shortest time possible (Graham, 1969).

Results are exchanged weight by weight: each tensor is sent by the rank that has it and arrives where it stays.  Nothing
is pickled but a few numbers per weight, and no rank holds a second copy of what it receives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.distributed import broadcast, gather_lists, rank_and_world
from moeq.quant.spec import Fallback, QuantizedWeight

# A unit's work: a second of a core, and enough rows for a GPU; experts above it are solved one at a time.
UNIT_OPERATIONS = 1 << 36


@dataclass(frozen=True)
class SolvedWeight:
    """One quantized weight, the relative output error of the stack it was solved in, and what went wrong, if anything.

    Linears that are stacked (q, k and v; gate and up) share their relative error.
    """

    name: str
    weight: QuantizedWeight
    relative_error: float
    fallbacks: tuple[Fallback, ...]
    offset_OI: Tensor | None


def solve_operations(out_features: int, in_features: int) -> int:
    """Floating-point operations of one solve, as the text above counts them."""
    return in_features**3 // 3 + 2 * out_features * in_features**2


def experts_per_unit(out_features: int, in_features: int) -> int:
    """Experts of a stack: as many as the work of a unit holds, and at least one."""
    return max(1, UNIT_OPERATIONS // solve_operations(out_features, in_features))


def divide(costs: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each unit; of equal units the earlier one goes first, of equal ranks the lower one takes it."""
    loads, owners = [0] * num_ranks, [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        owners[unit] = loads.index(min(loads))
        loads[owners[unit]] += costs[unit]
    return owners


def gather_solved(solved: Sequence[SolvedWeight]) -> list[SolvedWeight]:
    """Solved weights of all ranks, rank by rank, on the CPU.

    Args:
        solved: Those of this rank, on the CPU.
    """
    rank, world = rank_and_world()
    if world == 1:
        return list(solved)
    own, gathered = iter(solved), []
    for source, outline in gather_lists([(rank, _with_tensors(weight, _outline)) for weight in solved]):
        weight = next(own) if source == rank else _with_tensors(outline, _empty)
        for tensor in _tensors(weight):
            broadcast(tensor, source)
        gathered.append(weight)
    return gathered


def _outline(tensor: Tensor) -> Tensor:
    """Its shape and dtype alone, which take no space."""
    return tensor.to("meta")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


def _tensors(solved: SolvedWeight) -> list[Tensor]:
    found = (*solved.weight.tensors().values(), solved.offset_OI)
    return [tensor for tensor in found if tensor is not None]


def _with_tensors(solved: SolvedWeight, change: Callable[[Tensor], Tensor]) -> SolvedWeight:
    """The same record with each of its tensors changed."""
    offset_OI = solved.offset_OI
    return replace(
        solved, weight=solved.weight.each(change), offset_OI=None if offset_OI is None else change(offset_OI)
    )
