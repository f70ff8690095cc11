"""Products of packed weights beside bfloat16, on this machine: a block of experts, one weight, a whole small model.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.packed --json benchmarks/results/packed.json
    OMP_NUM_THREADS=1 python -m benchmarks.speed.packed --parts weight            # the table of moeq.kernels.crossover

- `block`: experts of the shape of Qwen3-30B-A3B (128 of 768 x 2048, 8 for a token), which no cache holds.  bfloat16 is
  the faster of transformers' two implementations.  What the bytes allow is bfloat16's bytes over those of the form.
- `weight`: one weight of 768 x 2048: up to how many rows the operation on 4 bits is faster than to make the weight and
  multiply, beside dense products in both dtypes.
- `decode`: a model of 0.86 B parameters, token after token, beside bfloat16 and llama.cpp with the same codes (Q4_0).

Sides run in turn.  Times are processor seconds, the smallest of the turns, since other work on the machine disturbs
them less than the clock; ratios are medians over the ratios within a turn.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from time import process_time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

from benchmarks.lab.study import Study
from benchmarks.lab.tables import Row, markdown
from benchmarks.speed.drawn import drawn_weight
from benchmarks.speed.made_packed import LARGE_BLOCK, dense_experts, prepared_experts
from benchmarks.speed.packed_decode import decode_row, decode_table
from moeq.checkpoint.forms import Maker
from moeq.checkpoint.nibble_forms import NibbleForm, SqueezedForm
from moeq.checkpoint.packed import PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat

PARTS = ("block", "weight", "decode")
# Bits and form of the sides of the block, by name.
SIDES: dict[str, tuple[int, Maker]] = {
    "4 bits": (4, NibbleForm.of),
    "8 bits": (8, NibbleForm.of),
    "4 bits, squeezed": (4, SqueezedForm.of),
    "3 bits, squeezed": (3, SqueezedForm.of),
    "2 bits, squeezed": (2, SqueezedForm.of),
}
GROUP = 64
DENSE = ("grouped_mm", "eager")
WEIGHT, ROWS = (768, 2048), (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)


@dataclass(frozen=True)
class Case:
    """A part, and how many tokens (``block``), rows (``weight``) or sequences (``decode``) at once."""

    seed: int
    part: str
    num: int


class PackedSpeed(Study[Case]):
    """Every part at every size."""

    title = "Packed products beside bfloat16"
    legend = "What is timed, and how: `benchmarks/speed/packed.py`."
    seeds = (0,)
    quick: ClassVar = {"turns": 1, "experts": 4, "tokens": [1, 16], "rows": [1, 64], "sequences": [1], "layers": 1}
    keeps = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
        parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="of the block")
        parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512], help="of the block")
        parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of the weight")
        parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16], help="that are decoded at once")
        parser.add_argument("--turns", type=int, default=20, help="of one token; fewer of more")
        parser.add_argument("--experts", type=int, default=LARGE_BLOCK["num_experts"], help="of the block")
        parser.add_argument("--layers", type=int, default=8, help="of the small model")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cases(self) -> list[Case]:
        o = self.options
        sizes = {"block": o.tokens, "weight": o.rows, "decode": o.sequences}
        return [Case(seed, part, num) for seed in o.seeds for part in o.parts for num in sizes[part]]

    @torch.no_grad()
    def measure(self, case: Case) -> Row:
        torch.manual_seed(case.seed)
        turns = max(1, self.options.turns // (1 if case.num == 1 else 4 if case.num <= 16 else 6))
        if case.part == "block":
            return self._time_block(case.num, turns)
        if case.part == "weight":
            return time_weight(WEIGHT, case.num, self.options.turns)
        return decode_row(case.num, self.options.layers, num_tokens=4 * turns)

    @cached_property
    def _experts(self) -> dict[str, nn.Module]:
        dense = dense_experts(Qwen3MoeConfig(**LARGE_BLOCK | {"num_experts": self.options.experts}))
        return {"bfloat16": dense} | {name: _prepared(dense, name) for name in self.options.sides}

    def _time_block(self, tokens: int, turns: int) -> Row:
        dense, packed = self._experts["bfloat16"], dict(self._experts)
        del packed["bfloat16"]
        config: Any = dense.config
        sides: dict[str, Callable[[], object]] = {name: partial(_run_dense, dense, name, tokens) for name in DENSE}
        sides |= {name: partial(_run, experts, config, tokens) for name, experts in packed.items()}
        seconds = in_turn(sides, turns)
        best = min(DENSE, key=lambda name: min(seconds[name]))
        whole = sum(parameter.nbytes for parameter in dense.parameters())
        return {
            "bfloat16": best,
            "seconds": seconds,
            "bytes_ratio": {name: whole / _bytes(experts) for name, experts in packed.items()},
        }

    def report(self, rows: Sequence[Row]) -> str:
        tables = {"block": block_table, "weight": weight_table, "decode": decode_table}
        found = {part: [row for row in rows if row["part"] == part] for part in PARTS}
        return "\n".join(f"## {part}\n\n{tables[part](found[part])}" for part in PARTS if found[part])


def in_turn(sides: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each side in every turn; one turn before them is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, work in sides.items():
            start = process_time()
            work()
            if turn:
                found[name].append(process_time() - start)
    return found


def time_weight(shape: tuple[int, int], rows: int, turns: int) -> Row:
    """Seconds of the operation, of the dequantized product, and of dense ones."""
    form = NibbleForm.of(drawn_weight(*shape, PackedFormat(4, GROUP, symmetric=False)))
    dense_OI, x_MI = torch.randn(shape).bfloat16(), torch.randn(rows, shape[1]).bfloat16()
    return in_turn(
        {
            "operation": partial(form.by_operation, x_MI),
            "dequantized": partial(form.by_weight, x_MI),
            "bfloat16": partial(torch.nn.functional.linear, x_MI, dense_OI),
            "float32": partial(torch.nn.functional.linear, x_MI.float(), dense_OI.float()),
        },
        turns,
    )


def _prepared(dense: nn.Module, side: str) -> PackedExperts:
    bits, maker = SIDES[side]
    return prepared_experts(dense, PackedFormat(bits, GROUP, symmetric=False), maker)


def _run_dense(experts: nn.Module, implementation: str, tokens: int) -> None:
    experts.config._experts_implementation = implementation  # type: ignore[union-attr]
    _run(experts, experts.config, tokens)


def _run(experts: nn.Module, config: Any, tokens: int) -> None:
    experts(*_drawn_routing(config, tokens))


def _drawn_routing(config: Any, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, index = torch.randn(tokens, config.num_experts).softmax(-1).topk(min(8, config.num_experts))
    return torch.randn(tokens, config.hidden_size).bfloat16(), index, weights.bfloat16()


def _bytes(experts: nn.Module) -> int:
    forms = (module.form for module in experts.modules() if isinstance(module, PackedLinear))
    return sum(form.nbytes for form in forms if form is not None)


def block_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        dense = row["seconds"][row["bfloat16"]]
        for name, allowed in row["bytes_ratio"].items():
            ours = row["seconds"][name]
            faster = median(a / b for a, b in zip(dense, ours, strict=True))
            times = [f"{1e3 * min(seconds):.2f} ({1e3 * median(seconds):.2f})" for seconds in (dense, ours)]
            lines.append([row["num"], name, *times, f"{faster:.2f}", f"{allowed:.2f}", f"{faster / allowed:.0%}"])
    head = ["tokens", "form", "bfloat16, ms (median)", "packed, ms (median)", "times faster", "bytes allow", "share"]
    return markdown(head, lines)


def weight_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    names = [name for name in ("operation", "dequantized", "bfloat16", "float32") if name in rows[0]]
    lines = [[row["num"], *(f"{1e3 * min(row[name]):.2f}" for name in names)] for row in rows]
    return markdown(["rows", *(f"{name}, ms" for name in names)], lines)


if __name__ == "__main__":
    PackedSpeed.main()
