"""What mixed precision costs and saves when it runs: size, time and quality of uniform and mixed plans of equal size.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.efficiency --json benchmarks/results/efficiency.json

- `quality`: KL of every plan on the bundled model, from one survey's solved candidates (GPTQ) a seed, which draws the
  calibration set.  The other parts are of the first seed's plans.
- `packed`: each plan on a model of real shapes (drawn weights, ``efficiency_plans.py``) in moeq's packed path, beside
  bfloat16: decoding 1 and 16 sequences, a prompt of 512 tokens.
- `files`: the same plan with fewer experts a block, written as moeq's packed folder and as a GGUF file: time of opening
  both, and the same tasks in llama.cpp beside its bfloat16.
- `memory`: of such files, what a process of its own takes that opens one and decodes (``plan_memory.py``).
- `mlx`: of such folders, the same tasks in mlx-lm on the CPU beside float32, as a check: its kernels are for GPUs.

A row of a time holds both of its sides, which took turns, so parts may be run one after another (``--parts``).
Llama.cpp's own types of 2 and 3 bits have files alone: what they are worth is in ``results/gguf.md``.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from benchmarks.lab.study import MODEL, Study, case_name
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.speed.made_packed import dense_model, prepared_model
from benchmarks.speed.plan_speed import in_turns, joules
from benchmarks.studies.efficiency_files import PlanFiles
from benchmarks.studies.efficiency_plans import (
    CHOICES,
    DENSE,
    GRID,
    K_QUANTS,
    NUM_BLOCKS,
    PLANS,
    Plan,
    Surveyed,
    assembled_row,
    carried,
    config_of,
    from_labels,
    k_quants,
    labels,
    make_plan,
    shapes_of,
    survey,
)
from benchmarks.studies.efficiency_report import draw, report
from moeq.allocation.plan import plan_cost
from moeq.allocation.time_table import TimeTable, plan_milliseconds, read_times
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.prepare import model_bytes
from moeq.disk.atomic import write_json
from moeq.quant.spec import WeightShape
from moeq.timing.measure import measure_times

PARTS = ("quality", "packed", "files", "memory", "mlx")
OF_FILES = PARTS[2:]
EVERY = (*PLANS, *K_QUANTS)
SIZE = 3.25  # uniform 3 bits in groups of 64


@dataclass(frozen=True)
class Case:
    """A part of a plan."""

    seed: int
    part: str
    plan: str


class Efficiency(Study[Case]):
    """Every part of every plan."""

    title = "What mixed precision costs and saves when it runs"
    legend = (
        "KL in nats per token, mean over four domains, of the bundled model; times are of two blocks of the shapes of "
        "DeepSeek-MoE-16B, processor seconds of one thread, beside bfloat16 in turn. What is measured, and on what: "
        "`benchmarks/studies/efficiency.py`; plans: `efficiency_plans.py`."
    )
    quick: ClassVar = {
        "seeds": [0], "plans": [DENSE, "4 bits", "allocated per projection"], "experts": 16, "hidden": 256, "turns": 1,
        "prompt": 16, "windows": 8, "texts": 1, "file_experts": 8, "solver": "rtn",
    }  # fmt: skip

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
        parser.add_argument("--plans", nargs="+", choices=EVERY, default=list(EVERY))
        parser.add_argument("--size", type=float, default=SIZE, help="bits per weight of mixed plans, with scales")
        parser.add_argument("--windows", type=int, default=32, help="of calibration")
        parser.add_argument("--solver", choices=("gptq", "rtn"), default="gptq", help="of every plan")
        parser.add_argument("--texts", type=int, default=8, help="windows of each domain of evaluation")
        parser.add_argument("--experts", type=int, default=64, help="of a block of the model of real shapes")
        parser.add_argument("--file-experts", type=int, default=8, help="the same where files are written")
        parser.add_argument("--hidden", type=int, default=2048, help="of the model of real shapes")
        parser.add_argument("--blocks", type=int, default=2, help="of the same that are run")
        parser.add_argument("--turns", type=int, default=3)
        parser.add_argument("--prompt", type=int, default=512, help="tokens")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._surveys: dict[int, Surveyed] = {}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cases(self) -> list[Case]:
        o = self.options
        seeds = {part: o.seeds if part == "quality" else o.seeds[:1] for part in PARTS if part in o.parts}
        return [
            Case(seed, part, plan)
            for part in seeds for seed in seeds[part] for plan in o.plans
            if part in ("files", "memory") or plan not in K_QUANTS
        ]  # fmt: skip

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(MODEL, Texts(num_windows=self.options.texts))

    def surveyed(self, seed: int) -> Surveyed:
        """Of the bundled model; kept until another seed is asked for."""
        if seed not in self._surveys:
            o = self.options
            self._surveys = {seed: survey(self.yardstick, seed, o.windows, o.folder, o.solver)}
        return self._surveys[seed]

    @cached_property
    def large(self) -> list[WeightShape]:
        """Weights of the model of real shapes, with as many blocks as the bundled one."""
        return shapes_of(self._config(self.options.experts, NUM_BLOCKS))

    @cached_property
    def times(self) -> TimeTable:
        """Of products with these weights on this machine, measured once."""
        path = self.options.folder / "times.json"
        if not path.is_file():
            write_json(path, measure_times(self.large, CHOICES, GRID, turns=self.options.turns).to_json())
        return read_times(path)

    @property
    def tasks(self) -> dict[str, int]:
        """As ``plan_speed.in_turns`` takes them."""
        return {"decode 1": 6, "decode 16": 2, "prompt": self.options.prompt}

    def _config(self, num_experts: int, num_blocks: int | None = None) -> Any:
        blocks = num_blocks or self.options.blocks
        return config_of(num_experts=num_experts, hidden_size=self.options.hidden, num_hidden_layers=blocks)

    def measure(self, case: Case) -> Row:
        if case.part == "quality":
            return self._quality(case)
        return self._on_files(case) if case.part in OF_FILES else self._packed(self._plan(case))

    def _quality(self, case: Case) -> Row:
        surveyed = self.surveyed(case.seed)
        plan = make_plan(case.plan, surveyed, self.options.size, self.times, self.large)
        found = {"choices": labels(plan), "domains": assembled_row(self.yardstick, surveyed.candidates, plan)}
        if not plan:
            return found | {"bits": 16.0, "large_bits": 16.0}
        on_large = carried(plan, self.large)
        return found | {
            "bits": plan_cost(plan, surveyed.weights).average_bits,
            "large_bits": plan_cost(on_large, self.large).average_bits,
            "milliseconds": plan_milliseconds(on_large, self.large, self.times),
        }

    def _plan(self, case: Case) -> Plan:
        """Of the bundled model, as its quality was measured."""
        path = self.options.folder / f"{case_name(Case(case.seed, 'quality', case.plan))}.json"
        return from_labels(json.loads(path.read_text())["row"]["choices"])

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The model of real shapes in bfloat16."""
        return dense_model(self._config(self.options.experts))

    def _packed(self, plan: Plan) -> Row:
        sides, config = {DENSE: self.dense}, self._config(self.options.experts)
        weights = shapes_of(config)
        on_these = carried(plan, weights)
        if plan:
            grids = {name: PackedFormat.of(grid) for name, grid in on_these.items()}
            sides["plan"] = prepared_model(config, grids)
        before = joules()
        seconds = in_turns(sides, self.tasks, self.options.turns)
        used = None if before is None else (joules() or before) - before
        num_bytes = {name: model_bytes(model) for name, model in sides.items()}
        bits = plan_cost(on_these, weights).average_bits if plan else 16.0
        return {"seconds": seconds, "bytes": num_bytes, "bits": bits, "joules": used, "prompt": self.options.prompt}

    @cached_property
    def files(self) -> PlanFiles:
        """Of the model of real shapes with fewer experts."""
        return PlanFiles(self._config(self.options.file_experts), self.options.folder)

    def _on_files(self, case: Case) -> Row:
        weights = shapes_of(self.files.config)
        named = case.plan in K_QUANTS
        plan = k_quants(K_QUANTS[case.plan], weights) if named else carried(self._plan(case), weights)
        grids = {name: PackedFormat.of(grid) for name, grid in plan.items()}
        if case.part == "memory":
            return self.files.memory(grids)
        if case.part == "mlx":
            return self.files.times_in_mlx(grids, self.tasks, self.options.turns)
        return self.files.times(grids, self.tasks, self.options.turns)

    def report(self, rows: Sequence[Row]) -> str:
        return report(rows)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, path)


if __name__ == "__main__":
    Efficiency.main()
