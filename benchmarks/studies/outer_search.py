"""Allocation judged on the real thing: what a search on the assembled quantized model adds to the one-shot program.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.outer_search --json benchmarks/results/outer_search.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/outer_search_mixtral.json

The setting is that of ``allocation.py``: AGQ in groups of 64 at 2, 3, 4 or 8 bits, on 32 windows that the model writes
(EBSS in corpus mode).  The search measures on 32 further windows that it writes.  Both plans are then solved by an
ordinary fit.  Other ways to give bits stand in the results of ``allocation.py`` (``--others``), on windows of the same
kind.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from tempfile import gettempdir
from typing import ClassVar

import torch

from benchmarks.lab.sets import SAMPLED, sampled_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.studies.allocation import GRID, GROUP, NUM_WINDOWS, GivenPlan
from benchmarks.studies.allocation_rows import WIDTHS
from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.allocate import allocate
from moeq.allocation.constraints import Budget, Constraints
from moeq.allocation.evidence import CostTable
from moeq.allocation.outer import search
from moeq.allocation.plan import Choice, plan_cost
from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.module import MoEQuantModule
from moeq.quant.spec import SolveSpec, WeightShape
from moeq.survey.assembled import AssembledModels
from moeq.survey.judge import SurveyJudge, open_judge
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from moeq.survey.sweeps import BlockStates, Inputs, unseen

CHOICES = tuple(Choice(bits, GROUP) for bits in WIDTHS)
MORE = tuple(Choice(bits, GROUP) for bits in (*WIDTHS, 5, 6))
NUM_ROUNDS = 4
ARMS = ("one-shot program", "search", "program, also 5 and 6 bits")
# Rows of ``allocation.py`` that stand beside them.
OTHERS = ("uniform", "PMQ", "allocator, gemq", "allocator, fisher_kl", "allocator, fisher")


@dataclass(frozen=True)
class Case:
    """A plan and its quantization."""

    seed: int
    budget: float
    arm: str


@dataclass(frozen=True)
class Surveyed:
    """A surveyed model, the judge of the search, and the same plans on further windows that neither saw."""

    costs: CostTable
    judge: SurveyJudge
    control: AssembledModels


class OuterSearch(Study[Case]):
    """The search beside the program, on one model."""

    title = "Allocation judged on the assembled model"
    legend = (
        "KL to the original in nats per token: of the plan assembled from solved candidates, on the windows of the "
        "search and on 32 others that the model wrote, and of an ordinary fit, mean over four domains of text. Mean "
        "and standard deviation over seeds."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [2.5]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", help="name of the model in folders and tables")
        parser.add_argument(
            "--budgets", type=float, nargs="+", default=[2.1, 2.5, 3.0, 3.5], help="code bits per weight"
        )
        parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
        parser.add_argument("--others", type=Path, help="result of allocation.py on the same model")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.title = f"Allocation judged on the assembled model: {options.label} model"  # type: ignore[misc]
        self._surveyed: dict[int, Surveyed] = {}

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(seed, budget, arm) for seed in o.seeds for budget in o.budgets for arm in o.arms]

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=16))

    @cached_property
    def weights(self) -> list[WeightShape]:
        """Of the model."""
        module = MoEQuantModule(name=self.options.model)
        module.configure_model()
        return list(module.weight_shapes())

    def ids(self, seed: int) -> torch.Tensor:
        """Windows of a seed: to solve on, to search on, and others."""
        return sampled_set(self.yardstick, SAMPLED["corpus"], "corpus", seed, self.options.folder, 3 * NUM_WINDOWS)

    def surveyed(self, seed: int) -> Surveyed:
        """The survey of a seed with its candidates; one at a time."""
        if seed not in self._surveyed:
            self._surveyed.clear()
            model, waiting = self.yardstick.model, WaitingStates(1 << 30, Path(gettempdir()))
            adapter = Adapter(model)
            solve = SolveSpec(damping=0.01)
            spec = SurveySpec(("fisher",), grid=GRID, seed=seed, solve=solve, choices=MORE, num_gradient_batches=4)
            solving, searching, others = self.ids(seed).split(NUM_WINDOWS)
            judge = open_judge(adapter, spec, _batches(searching), waiting)
            found = survey_model(model, solving.split(8), spec, judge=judge)
            states = BlockStates(WaitingStates(1 << 30, Path(gettempdir())))
            models = AssembledModels(adapter, judge.candidates, _batches(others), states)
            self._surveyed[seed] = Surveyed(found.costs["fisher"], judge, models)
        return self._surveyed[seed]

    def measure(self, case: Case) -> Row:
        surveyed = self.surveyed(case.seed)
        constraints = Constraints(MORE if case.arm == ARMS[2] else CHOICES, Budget(case.budget), GRID)
        extra: Row = {}
        start = time.process_time()
        if case.arm == "search":
            found, how = search(self.weights, surveyed.costs, constraints, surveyed.judge, NUM_ROUNDS)
            extra = {
                "num_measured": how.num_measured,
                "num_slopes": how.num_slopes,
                "rounds": [asdict(each) for each in how.rounds],
            }
        else:
            found = allocate(self.weights, surveyed.costs, constraints)
        seconds = time.process_time() - start
        (kl_search,), (kl_control,) = (
            surveyed.judge.measure([found.plan]),
            surveyed.control.measure([found.plan], unseen),
        )
        steps = [GivenPlan(found.plan), HessianCalibration(), CachedGridGPTQ()]
        solving = self.ids(case.seed)[:NUM_WINDOWS]
        module = fit(solving, steps, name=self.options.model, bits=2, group_size=GROUP, affinity_power=1.0)
        return {
            **asdict(plan_cost(found.plan, self.weights)), "predicted": found.predicted, "seconds": seconds,
            "kl_search": kl_search, "kl_control": kl_control, "domains": self.yardstick.row(module.model), **extra,
        }  # fmt: skip

    def report(self, rows: Sequence[Row]) -> str:
        assembled, fits = ["assembled (searched on)", "assembled (others)"], ["fit", "fit (worst domain)"]
        head = ["bits", "arm", "code bits", "predicted", *assembled, *fits, "seconds"]
        lines = []
        for (budget, arm), group in sorted(grouped(rows, lambda row: (row["budget"], row["arm"])).items()):
            mean = fmean(row["code_bits"] for row in group)
            cells = [cell([row[key] for row in group], ".4f") for key in ("predicted", "kl_search", "kl_control")]
            cells += [cell([of(row) for row in group], ".4f") for of in (mean_kl, worst_kl)]
            lines.append([budget, arm, f"{mean:.3f}", *cells, cell([row["seconds"] for row in group], ".0f")])
        return f"{markdown(head, lines)}\n{self._ratios(rows)}"

    def _ratios(self, rows: Sequence[Row]) -> str:
        """KL of the search over that of every other way, paired by seed."""
        others = json.loads(self.options.others.read_text())["entries"] if self.options.others else []
        known: dict[tuple[str, float, int], float] = {
            (row["row"], row["budget"], row["seed"]): mean_kl(row) for row in others if row["row"] in OTHERS
        }
        known |= {(row["arm"], row["budget"], row["seed"]): mean_kl(row) for row in rows}
        budgets = sorted({row["budget"] for row in rows})
        lines = []
        for name in dict.fromkeys(name for name, _, _ in known if name != "search"):
            cells = []
            for budget in budgets:
                seeds = [seed for other, at, seed in known if (other, at) == (name, budget)]
                pairs = [
                    known["search", budget, s] / known[name, budget, s] for s in seeds if ("search", budget, s) in known
                ]
                cells.append(cell(pairs, ".3f") if pairs else "")
            lines.append([name, *cells])
        text = markdown(["KL of the search over that of", *(f"{budget} bits" for budget in budgets)], lines)
        return (
            "Fits, paired by seed; below 1 the search is better. Rows of `allocation.py` were solved on other windows "
            f"of the same kind.\n\n{text}"
        )


def _batches(ids_NL: torch.Tensor) -> dict[int, Inputs]:
    """Batches of 8 by number, behind those that are solved on."""
    return {NUM_WINDOWS + number: {"input_ids": ids_BL} for number, ids_BL in enumerate(ids_NL.split(8))}


if __name__ == "__main__":
    OuterSearch.main()
