"""The price of what runtimes demand: who shares a width, and what there is to choose from, at equal size of the files.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.sharing --json benchmarks/results/sharing.json

The program of the allocator (``fisher`` costs) at sizes with scales and zero points counted, in moeq's own files for
all rows, so that nothing but the sharing and the choices differs.  Plans are assembled from the survey's solved weights
(GPTQ on the inputs of the original model, 32 windows that it writes) and measured on the evaluation texts.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from tempfile import gettempdir
from typing import ClassVar

import numpy as np

from benchmarks.lab.sets import SAMPLED, sampled_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl
from benchmarks.lab.yardstick import Texts, Yardstick
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.allocation.problem import AllocationProgram, build_problem
from moeq.allocation.runtime import RUNTIMES
from moeq.allocation.solver import solve
from moeq.checkpoint.loading import load_model
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.module import MoEQuantModule
from moeq.quant.spec import GridSpec, SolveSpec, WeightShape
from moeq.survey.candidates import Candidates, Plan
from moeq.survey.judge import open_judge
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

GRID = GridSpec(bits=2, group_size=64)
NUM_WINDOWS, KEPT_BITS = 32, 16
SHARING: dict[str, Callable[[WeightShape], Hashable]] = {
    "every weight its own": RUNTIMES["research"].key,
    "one per expert": RUNTIMES["gptqmodel"].key,
    "one per projection and block": RUNTIMES["mlx"].key,
    "one per block (experts; fused linears)": RUNTIMES["vllm"].key,
    "one per structure of a block": lambda weight: (weight.block, weight.kind),
    "uniform": lambda weight: None,
}


def _choices(bits: Sequence[int], sizes: Sequence[int]) -> tuple[Choice, ...]:
    return tuple(Choice(b, size) for b in bits for size in sizes)


OFFERS: dict[str, tuple[Choice, ...]] = {
    "2, 3, 4, 8; groups of 64": _choices((2, 3, 4, 8), (64,)),
    "2 to 6; groups of 64": _choices((2, 3, 4, 5, 6), (64,)),
    "2 to 6; groups of 128": _choices((2, 3, 4, 5, 6), (128,)),
    "2 to 6; groups of 32, 64, 128": _choices((2, 3, 4, 5, 6), (32, 64, 128)),
    "the same, or left alone": _choices((2, 3, 4, 5, 6), (32, 64, 128)),
}


@dataclass(frozen=True)
class Case:
    """One program: a size in bits per weight with scales and zero points, who shares, what there is to choose from."""

    seed: int
    size: float
    sharing: str
    offer: str


def shared(program: AllocationProgram, key: Callable[[WeightShape], Hashable]) -> AllocationProgram:
    """A program in which weights of equal key get one choice."""
    rows: dict[Hashable, list[int]] = {}
    for row, (weight,) in enumerate(program.units):
        rows.setdefault(key(weight), []).append(row)
    parts = list(rows.values())
    return replace(
        program, units=tuple(tuple(program.units[row][0] for row in part) for part in parts),
        cost_UC=np.stack([program.cost_UC[part].sum(0) for part in parts]),
        size_UC=np.stack([program.size_UC[part].sum(0) for part in parts]),
    )  # fmt: skip


def with_keeping(program: AllocationProgram) -> AllocationProgram:
    """A program in which units may be left alone: a last choice without damage, of 16 bits a weight."""
    num = len(program.units)
    numel_U1 = np.array([[sum(weight.numel for weight in unit)] for unit in program.units])
    return replace(
        program, cost_UC=np.concatenate([program.cost_UC, np.zeros((num, 1))], 1),
        size_UC=np.concatenate([program.size_UC, KEPT_BITS * numel_U1], 1),
    )  # fmt: skip


class Sharing(Study[Case]):
    """Who shares a width, and what there is to choose from."""

    title = "The price of what runtimes demand"
    legend = (
        "KL to the original in nats per token, mean over four domains, of plans assembled from solved candidates; mean "
        "and standard deviation over seeds, and in brackets what the plan takes: bits per weight with scales and "
        "zero points."
    )
    quick: ClassVar = {"seeds": [0], "sizes": [3.3]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", type=float, nargs="+", default=[2.8, 3.3])
        parser.add_argument("--sets", type=Path, help="folder of sampled sets; default is that of the rows")

    def cases(self) -> list[Case]:
        o = self.options
        return [
            Case(*each)
            for each in ((s, z, who, of) for s in o.seeds for z in o.sizes for who in SHARING for of in OFFERS)
        ]

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(MODEL, Texts(num_windows=8))

    @cached_property
    def weights(self) -> list[WeightShape]:
        """Of the model."""
        module = MoEQuantModule(name=MODEL)
        module.configure_model()
        return list(module.weight_shapes())

    @cached_property
    def surveyed(self) -> dict[int, tuple[CostTable, Candidates]]:
        """Costs and candidates by seed, of the last seed that was asked for."""
        return {}

    def survey(self, seed: int) -> tuple[CostTable, Candidates]:
        """Costs and candidates of a seed; the latter put weights into a model of their own."""
        if seed not in self.surveyed:
            self.surveyed.clear()
            model = load_model(MODEL, "auto", "auto")
            offered = tuple(dict.fromkeys(choice for offer in OFFERS.values() for choice in offer))
            spec = SurveySpec(
                costs=("fisher",), grid=GRID, seed=seed, solve=SolveSpec(damping=0.01), choices=offered,
                num_gradient_batches=4,
            )  # fmt: skip
            folder = self.options.sets or self.options.folder
            ids_NL = sampled_set(self.yardstick, SAMPLED["corpus"], "corpus", seed, folder, NUM_WINDOWS)
            judge = open_judge(Adapter(model), spec, {}, WaitingStates(1 << 30, Path(gettempdir())))
            found = survey_model(model, ids_NL.split(8), spec, judge=judge)
            self.surveyed[seed] = found.costs["fisher"], judge.candidates
        return self.surveyed[seed]

    def measure(self, case: Case) -> Row | None:
        costs, candidates = self.survey(case.seed)
        constraints = Constraints(OFFERS[case.offer], Budget(case.size, "average_bits"), GRID)
        program = shared(build_problem(self.weights, costs, constraints), SHARING[case.sharing])
        if case.offer == "the same, or left alone":
            program = with_keeping(program)
        try:
            solution = solve(program)
        except ValueError:  # nothing is as small as that
            return None
        plan = {
            weight.name: program.choices[choice].grid(GRID)
            for unit, choice in zip(program.units, solution.choice_U.tolist(), strict=True)
            for weight in unit
            if choice < len(program.choices)
        }
        used = Counter(Choice.of(plan[w.name]).label if w.name in plan else "kept" for w in self.weights)
        return {
            "predicted": solution.cost, "used": program.amount(solution.size), "choices": dict(sorted(used.items())),
            "domains": self._assembled(candidates, plan),
        }  # fmt: skip

    def _assembled(self, candidates: Candidates, plan: Plan) -> dict[str, dict[str, float]]:
        with ExitStack() as inside:
            for block in range(len(candidates.adapter.blocks)):
                inside.enter_context(candidates.in_place(block, plan))
            return self.yardstick.row(candidates.adapter.model)

    def report(self, rows: Sequence[Row]) -> str:
        sizes = sorted({row["size"] for row in rows})
        parts = []
        for size in sizes:
            found = grouped([row for row in rows if row["size"] == size], lambda row: (row["sharing"], row["offer"]))
            lines = [[who, *(self._cell(found.get((who, offer), [])) for offer in OFFERS)] for who in SHARING]
            parts.append(f"## {size} bits per weight\n\n{markdown(['one width for', *OFFERS], lines)}")
        return "\n".join([*parts, self._chosen(rows)])

    def _cell(self, group: Sequence[Row]) -> str:
        if not group:
            return ""
        size = fmean(row["used"] for row in group)
        return f"{cell([mean_kl(row) for row in group], '.4f')} ({size:.2f})"

    def _chosen(self, rows: Sequence[Row]) -> str:
        """What the program chooses where every weight may have anything."""
        free = [row for row in rows if row["sharing"] == next(iter(SHARING)) and row["offer"] == list(OFFERS)[-1]]
        lines = []
        for size, group in sorted(grouped(free, lambda row: row["size"]).items()):
            total: Counter[str] = sum((Counter(row["choices"]) for row in group), Counter())
            shares = ", ".join(f"{label} {num / len(group):.0f}" for label, num in total.most_common())
            lines.append([size, shares])
        return (
            f"## What is chosen where everything is offered\n\n{markdown(['size', 'weights, mean over seeds'], lines)}"
        )


if __name__ == "__main__":
    Sharing.main()
