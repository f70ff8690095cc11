"""Does the order matter: bits by the damage of solved weights, or by what learned rounding leaves of it.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.learned_costs --json benchmarks/results/learned_costs.json

The survey predicts what rounding a weight by GPTQ costs; learned rounding then takes more off at few bits than at many.
``costs of learned rounding`` are those of the survey, times the share of a block's output error that learned rounding
left in a fit with one width for all weights.  The program divides bits by either, AGQ solves and the rounding is
learned, in groups of 64 on 64 windows that the model wrote (EBSS in corpus mode).
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl

from benchmarks.lab.allocated import DAMPING
from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import fit
from benchmarks.lab.yardstick import Texts, Yardstick
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.router_calibration import RouterCalibration
from moeq.allocation.evidence import CostTable, Evidence, read_evidence
from moeq.allocation.plan import Choice, parse_choices
from moeq.disk.atomic import write_json
from moeq.module import MoEQuantModule
from moeq.quant.spec import GridSpec, SolveSpec, WeightShape
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model

WIDTHS, GROUP, NUM_WINDOWS = (2, 3, 4, 5, 6, 8), 64, 64
SOLVED, LEARNED = "costs of solved weights", "costs of learned rounding"
# Width, block -> share of the output error that is left.
Left = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Case:
    """A plan, solved and learned; or, without a budget, one width for all weights, whose learning is watched."""

    seed: int
    costs: str
    bits: float


class Watched(LearnedRounding):
    """Learned rounding that remembers by block what it left of the output error."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[int, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        assert isinstance(pl_module, MoEQuantModule)
        if pl_module.current_pass.ends_block:
            found = trainer.callback_metrics
            before, after = (float(found[f"learned_rounding/error_{when}"]) for when in ("before", "after"))
            self.left[pl_module.current_pass.block] = after / before


class LearnedCosts(Study[Case]):
    """Both kinds of costs at every budget."""

    title = "Bits by costs of learned rounding"
    legend = (
        "Bits of codes; KL to the original in nats a token after the rounding was learned, mean and worst of four "
        "domains (32 windows of 256 tokens), +- over seeds; share of the weights at each width; KL by costs of learned "
        "rounding over KL by costs of solved weights, paired by seed."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [3.0]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5], help="code bits per weight")

    def cases(self) -> list[Case]:
        """Seed by seed, what the plans of a seed read before them."""
        cases = []
        for seed in self.options.seeds:
            cases += [Case(seed, "uniform", float(bits)) for bits in WIDTHS]
            cases += [Case(seed, costs, bits) for bits in self.options.budgets for costs in (SOLVED, LEARNED)]
        return cases

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(MODEL, Texts())

    @cached_property
    def weights(self) -> list[WeightShape]:
        """Of the model."""
        module = MoEQuantModule(name=MODEL)
        module.configure_model()
        return list(module.weight_shapes())

    def measure(self, case: Case) -> Row:
        watched = Watched()
        plan = BitAllocation() if case.costs == "uniform" else self._allocated(case)
        steps = [plan, RouterCalibration(), HessianCalibration(), GPTQ(), watched]
        settings: dict[str, Any] = {"affinity_power": 1.0, "damping": DAMPING, "group_size": GROUP}
        if case.costs == "uniform":
            settings["bits"] = int(case.bits)
        module = fit(
            calibration_set(self.yardstick, "corpus", NUM_WINDOWS, case.seed, self.options.folder), steps, **settings
        )
        size, held = {weight.name: weight.numel for weight in self.weights}, Counter[int]()
        for name, grid in module.run.plan.items():
            held[grid.bits] += size[name]
        shares = {str(bits): count / held.total() for bits, count in sorted(held.items())}
        return {"left": watched.left, "widths": shares, "domains": self.yardstick.row(module.model)}

    def _allocated(self, case: Case) -> BitAllocation:
        """The program on one kind of costs."""
        path = self.survey(case.seed)
        if case.costs == LEARNED:
            evidence = read_evidence(path, self.weights)
            costs = {"fisher": learned_costs(evidence.costs["fisher"], self.weights, self.left(case.seed))}
            path = path.with_stem(f"{path.stem}-learned")
            write_json(path, replace(evidence, costs=costs).to_json())
        choices = [*WIDTHS]
        return BitAllocation(survey=str(path), method="allocate", cost="fisher", budget=case.bits, choices=choices)

    def survey(self, seed: int) -> Path:
        """The survey of a seed, made when it is first needed."""
        path: Path = self.options.folder / f"survey-{seed}.json"
        if not path.is_file():
            spec = SurveySpec(
                costs=("fisher",), choices=parse_choices(list(WIDTHS), GROUP), solve=SolveSpec(damping=DAMPING),
                grid=GridSpec(4, GROUP), seed=seed,
            )  # fmt: skip
            ids_NL = calibration_set(self.yardstick, "corpus", NUM_WINDOWS, seed, self.options.folder)
            evidence: Evidence = survey_model(self.yardstick.model, ids_NL.split(8), spec)
            write_json(path, evidence.to_json())
        return path

    def left(self, seed: int) -> Left:
        """What the uniform fits of a seed left."""
        found: dict[tuple[int, int], float] = {}
        for kept in self.options.folder.glob(f"seed_{seed}-costs_uniform-*.json"):
            row = json.loads(kept.read_text())["row"]
            found |= {(int(row["bits"]), int(block)): share for block, share in row["left"].items()}
        return found

    def report(self, rows: Sequence[Row]) -> str:
        head = ["bits", "costs", "seeds", "mean KL", "worst KL", *(f"{bits} bits %" for bits in WIDTHS)]
        lines = []
        for (bits, costs), group in sorted(grouped(rows, lambda row: (row["bits"], row["costs"])).items()):
            shares = [cell([100 * row["widths"].get(str(width), 0.0) for row in group], ".0f") for width in WIDTHS]
            kl = [cell([of(row) for row in group], ".4f") for of in (mean_kl, worst_kl)]
            lines.append([f"{bits:g}", costs, len(group), *kl, *shares])
        return f"{markdown(head, lines)}\n{_ratios(rows)}\n{_left_table(rows)}"


def learned_costs(costs: CostTable, weights: Sequence[WeightShape], left: Left) -> CostTable:
    """Costs times what learned rounding leaves of the error of their block at their width.

    Args:
        costs: By weight and choice.
        weights: Of the model.
        left: Of every block, at every width of the choices.
    """
    block = {weight.name: weight.block for weight in weights}

    def scaled(name: str, choice: Choice, cost: float) -> float:
        return cost * left[int(choice.bits), block[name]]

    return {name: {choice: scaled(name, choice, cost) for choice, cost in of.items()} for name, of in costs.items()}


def _ratios(rows: Sequence[Row]) -> str:
    """KL of one kind of costs over that of the other."""
    known = {(row["costs"], row["bits"], row["seed"]): mean_kl(row) for row in rows}
    lines = []
    for bits in sorted({row["bits"] for row in rows if row["costs"] == LEARNED}):
        pairs = [
            known[LEARNED, bits, seed] / known[SOLVED, bits, seed]
            for costs, at, seed in known if costs == LEARNED and at == bits and (SOLVED, bits, seed) in known
        ]  # fmt: skip
        lines.append([f"{bits:g}", cell(pairs, ".3f")])
    return markdown(["bits", "learned over solved"], lines)


def _left_table(rows: Sequence[Row]) -> str:
    """What learned rounding leaves of the output error of blocks."""
    uniform = grouped([row for row in rows if row["costs"] == "uniform"], lambda row: row["bits"])
    lines = []
    for bits, group in sorted(uniform.items()):
        blocks = sorted(group[0]["left"], key=int)
        lines.append([f"{bits:g}", *(cell([row["left"][block] for row in group], ".3f") for block in blocks)])
    num_blocks = max((len(line) - 1 for line in lines), default=0)
    return "What is left of a block's output error:\n\n" + markdown(
        ["bits", *(f"block {block}" for block in range(num_blocks))], lines
    )


if __name__ == "__main__":
    LearnedCosts.main()
