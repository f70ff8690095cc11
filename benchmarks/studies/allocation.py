"""QuantMoE-Bench: ways to give bits to the weights of a trained MoE, at equal bits, and what each costs.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.allocation --json benchmarks/results/allocation_reference.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/allocation_mixtral.json

The rows are in ``allocation_rows.py``.  Every seed has its own calibration set, which the model writes (EBSS in corpus
mode, 8k tokens), its own survey and its own random controls; weights are quantized by AGQ in groups of 64.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import torch

from benchmarks.lab.sets import SAMPLED, sampled_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.trial import CachedGridGPTQ, fit
from benchmarks.lab.yardstick import Texts, Yardstick
from benchmarks.recipes.reference_model.measure import exact_match
from benchmarks.studies.allocation_report import draw, findings, table
from benchmarks.studies.allocation_rows import COSTS, SCORES, WIDTHS, Plan, Setting, bits_by_structure, make_plan, rows
from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.evidence import Evidence, read_evidence
from moeq.allocation.plan import Choice, plan_cost
from moeq.disk.atomic import write_json
from moeq.disk.texts import read_documents
from moeq.module import MoEQuantModule
from moeq.quant.spec import GridSpec, SolveSpec, WeightShape
from moeq.survey.survey_spec import MEASURED, SurveySpec
from moeq.survey.surveyor import survey_model
from moeq.tasks.arithmetic import Sum, build_problems

GROUP = 64
GRID = GridSpec(bits=2, group_size=GROUP)
NUM_WINDOWS = 32
NUM_PROBLEMS = 100


@dataclass(frozen=True)
class Case:
    """One plan and its quantization."""

    seed: int
    budget: float
    row: str


class GivenPlan(pl.Callback):
    """The plan of a row."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        pl_module.run.plan = self._plan


class Allocation(Study[Case]):
    """Every way to give bits at every budget, on one model."""

    title = "Bit allocation"
    legend = (
        "KL to the original in nats per token, perplexity by domain, arithmetic problems answered right; mean and "
        "standard deviation over seeds (calibration set, survey and random controls). Sorted by mean KL."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [2.5], "rows": ["random linears", "attention", "allocator, fisher"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--label", default="reference", help="name of the model in folders and tables")
        parser.add_argument(
            "--budgets", type=float, nargs="+", default=[2.1, 2.5, 3.0, 3.5], help="code bits per weight"
        )
        parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="some of the rows")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.folder = options.folder / options.label
        self.title = f"Bit allocation: {options.label} model"  # type: ignore[misc]

    def cases(self) -> list[Case]:
        o = self.options
        wanted = o.rows or rows(self.weights)
        return [Case(seed, budget, row) for budget in o.budgets for seed in o.seeds for row in wanted]

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model, Texts(num_windows=16))

    @cached_property
    def problems(self) -> list[Sum]:
        """Sums that the model is asked."""
        lines = read_documents(Path(self.yardstick.texts.data_dir) / "arithmetic_sums.txt")
        sums = [line for document in lines for line in document.split("\n") if line.strip()]
        return build_problems(sums, NUM_PROBLEMS, num_shots=4)

    @cached_property
    def weights(self) -> list[WeightShape]:
        """Of the model."""
        module = MoEQuantModule(name=self.options.model)
        module.configure_model()
        return list(module.weight_shapes())

    def ids(self, seed: int) -> torch.Tensor:
        """Calibration ids of a seed."""
        return sampled_set(self.yardstick, SAMPLED["corpus"], "corpus", seed, self.options.folder, NUM_WINDOWS)

    def evidence(self, seed: int) -> Evidence:
        """The survey of a seed, made once."""
        path = self.options.folder / f"survey-{seed}.json"
        if not path.is_file():
            spec = SurveySpec(
                costs=tuple(cost for cost in COSTS if cost not in MEASURED), scores=SCORES, grid=GRID, seed=seed,
                solve=SolveSpec(damping=0.01),
                choices=tuple(Choice(bits, GROUP) for bits in WIDTHS), num_gradient_batches=4, predictor=True,
            )  # fmt: skip
            # Every weight is rounded alone at every width there: one batch of 2,048 tokens takes as long as all else.
            measured = replace(spec, costs=tuple(MEASURED), scores=(), num_gradient_batches=1, predictor=False)
            batches = self.ids(seed).split(8)
            first, second = (survey_model(self.yardstick.model, batches, each) for each in (spec, measured))
            write_json(path, replace(first, costs={**first.costs, **second.costs}).to_json())
        return read_evidence(path)

    def measure(self, case: Case) -> Row | None:
        plan = make_plan(case.row, case.budget, Setting(self.weights, self.evidence(case.seed), GRID, case.seed))
        if plan is None:
            return None
        steps = [GivenPlan(plan), HessianCalibration(), CachedGridGPTQ()]
        ids_NL = self.ids(case.seed)
        module = fit(ids_NL, steps, name=self.options.model, bits=2, group_size=GROUP, affinity_power=1.0)
        return {
            **asdict(plan_cost(plan, self.weights)), "domains": self.yardstick.row(module.model),
            "structure": bits_by_structure(plan, self.weights),
            "exact_match": exact_match(module.model, self.yardstick.tokenizer, self.problems),
        }  # fmt: skip

    def report(self, rows: Sequence[Row]) -> str:
        budgets = sorted({row["budget"] for row in rows})
        tables = "\n".join(f"## {budget} bits\n\n{table(rows, budget)}" for budget in budgets)
        return f"{tables}\n## Findings of the paper on this model\n\n{findings(rows)}"

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        draw(rows, self.options.label, path)


if __name__ == "__main__":
    Allocation.main()
