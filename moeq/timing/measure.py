"""Seconds of a product with each shape of a model's weights on each grid, as a prepared packed model multiplies.

A layer alone would stay in the caches of the processor, which a model does not: as many copies as the model has weights
of a shape, up to ``SPAN`` bytes, are multiplied in turn.  Grids take turns, too, so that what else the machine does
meets all of them; the least mean of a turn is kept.

Shapes: O out features, I in features, M rows of the input.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

from moeq.allocation.plan import Choice
from moeq.allocation.time_table import TimeTable, this_machine
from moeq.checkpoint.forms import CHOICE, Packed
from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, WeightShape

SPAN = 128 << 20
# Of the drawn weights; products take as long for any.
DEVIATION = 0.02
Progress = Callable[[Iterable[tuple[int, int]]], Iterable[tuple[int, int]]]


@torch.no_grad()
def measure_times(
    weights: Sequence[WeightShape], choices: Sequence[Choice], like: GridSpec, *, dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = (1,), room: bool = False, turns: int = 5, progress: Progress = iter,
) -> TimeTable:  # fmt: skip
    """Measure on this machine, with the threads that torch has now.

    Args:
        weights: Of a model; their values are drawn.
        choices: Those that a shape does not take (groups do not divide its in-features) are left out for it.
        like: Whether uniform grids have zero points.
        dtype: Of activations and scales.
        rows: M; 1 is a token, more are tokens at once.
        room: Whether weights may take more memory than their files.
        turns: How often each is repeated.
        progress: Wraps the shapes.
    """
    counts = Counter((weight.out_features, weight.in_features) for weight in weights)
    seconds: dict[tuple[str, int, int, int], float] = {}
    for shape in progress(sorted(counts)):
        fitting = [choice for choice in sorted({*choices}) if choice.fits(shape[1])]
        copies = {c.label: packed_copies(shape, c.grid(like), counts[shape], dtype, room=room) for c in fitting}
        for num_rows in rows:
            x_MI = torch.randn(num_rows, shape[1]).to(dtype)
            sides = {label: partial(_multiply, layers, x_MI) for label, layers in copies.items()}
            for label, found in least_seconds(sides, turns).items():
                seconds[label, *shape, num_rows] = found / len(copies[label])
    return TimeTable(this_machine(dtype), like.symmetric, room, seconds)


def packed_copies(
    shape: tuple[int, int], grid: GridSpec, num: int, dtype: torch.dtype, *, room: bool
) -> list[PackedLinear]:
    """Prepared linears of one drawn weight [O, I]: ``num``, or as many as ``SPAN`` holds."""
    solution = round_to_nearest(DEVIATION * torch.randn(1, *shape), grid, dtype)
    form = PackedFormat.of(grid)
    with torch.device("meta"):
        layer = PackedLinear(shape[1], shape[0], form, dtype)
    for name, tensor in packed_tensors(solution.expert(0, grid)).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    num_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    chosen = CHOICE["cpu"](Packed(form, shape, dtype, dtype, room))
    if not isinstance(chosen, str):
        layer.prepare(chosen)
    return [layer, *(copy.deepcopy(layer) for _ in range(min(num, max(1, SPAN // num_bytes)) - 1))]


def least_seconds(sides: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The least time of each side over some turns, in which all follow each other.

    Processor time on one thread, which other work on the machine disturbs less; the clock on several.
    """
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    least = dict.fromkeys(sides, float("inf"))
    for turn in range(turns + 1):  # the first pages weights in, and is not counted
        for label, work in sides.items():
            start = clock()
            work()
            least[label] = min(least[label], clock() - start if turn else float("inf"))
    return least


def _multiply(layers: Sequence[PackedLinear], x_MI: Tensor) -> None:
    for layer in layers:
        layer(x_MI)
