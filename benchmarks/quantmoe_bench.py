"""QuantMoE-Bench: ways to give bits to the weights of a trained MoE, at equal bits, and what each costs.

    OMP_NUM_THREADS=1 python benchmarks/quantmoe_bench.py --json benchmarks/results/allocation_reference.json
    ... --model runs/mixtral_moe/model --label Mixtral --json benchmarks/results/allocation_mixtral.json

The rows are in ``quantmoe_rows.py``.  Every seed has its own calibration set, which the model writes (EBSS in corpus
mode, 8k tokens), its own survey and its own random controls; weights are quantized by AGQ in groups of 64.  Results of
single runs are kept in ``--folder``, so that a stopped benchmark goes on; ``--share 0/2`` and ``--share 1/2`` in two
processes divide it, and one more run without a share writes the report.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import SAMPLED, sampled_set
from measure import exact_match
from origin import origin
from quantmoe_report import write_report
from quantmoe_rows import COSTS, SCORES, WIDTHS, Plan, Setting, bits_by_structure, make_plan, rows
from trial import CachedGridGPTQ, Texts, Yardstick, fit

from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.evidence import Evidence, read_evidence
from moeq.allocation.plan import Choice, plan_cost
from moeq.disk.atomic import write_json
from moeq.disk.texts import read_documents
from moeq.module import MoEQuantModule
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.settings import MEASURED, SurveySpec
from moeq.survey.surveyor import survey_model
from moeq.tasks.arithmetic import build_problems

GROUP = 64
GRID = GridSpec(bits=2, group_size=GROUP)
NUM_WINDOWS = 32
NUM_PROBLEMS = 100


class GivenPlan(pl.Callback):
    """The plan of a row."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        pl_module.prepare()
        pl_module.run.plan = self._plan


class Bench:
    """One model under the benchmark: evaluation, calibration sets, surveys, weights."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.yardstick = Yardstick(model, Texts(num_windows=16))
        lines = read_documents(Path(self.yardstick.texts.data_dir) / "arithmetic_sums.txt")
        sums = [line for document in lines for line in document.split("\n") if line.strip()]
        self.problems = build_problems(sums, NUM_PROBLEMS, num_shots=4)
        module = MoEQuantModule(name=model)
        module.configure_model()
        module.prepare()
        self.weights = module.weight_shapes()

    def ids(self, seed: int) -> torch.Tensor:
        """Calibration ids of a seed."""
        return sampled_set(self.yardstick, SAMPLED["corpus"], "corpus", seed, self.folder, NUM_WINDOWS)

    def evidence(self, seed: int) -> Evidence:
        """The survey of a seed, made once."""
        path = self.folder / f"survey-{seed}.json"
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

    def measure(self, row: str, budget: float, seed: int) -> dict[str, Any] | None:
        """Plan, quantize, compare; None where the row has no plan at this budget."""
        plan = make_plan(row, budget, Setting(self.weights, self.evidence(seed), GRID, seed))
        if plan is None:
            return None
        steps = [GivenPlan(plan), HessianCalibration(), CachedGridGPTQ()]
        module = fit(self.ids(seed), steps, name=self.model, bits=2, group_size=GROUP, affinity_power=1.0)
        domains = {domain: asdict(found) for domain, found in self.yardstick.measure(module.model).items()}
        return {
            "row": row, "budget": budget, "seed": seed, **asdict(plan_cost(plan, self.weights)), "domains": domains,
            "structure": bits_by_structure(plan, self.weights),
            "exact_match": exact_match(module.model, self.yardstick.tokenizer, self.problems),
        }  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing of this share, then write the report where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-moe", help="folder of a model with the same tokenizer")
    parser.add_argument("--label", default="reference", help="name of the model in folders and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.1, 2.5, 3.0, 3.5], help="code bits per weight")
    parser.add_argument("--rows", nargs="+", default=None, metavar="ROW", help="some of the rows")
    parser.add_argument("--share", default="0/1", help="this process of so many")
    parser.add_argument("--quick", action="store_true", help="one seed, 2.5 bits, three rows: about a minute")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantmoe_bench"), help="sets, surveys, results")
    parser.add_argument("--json", type=Path, help="write all results here, and .md and .png beside it")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.budgets = options.seeds[:1], [2.5]
        options.rows = ["random linears", "attention", "allocator, fisher"]
    folder = options.folder / options.label
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.model, folder)
    wanted = options.rows or rows(bench.weights)
    part, num_parts = map(int, options.share.split("/"))
    cases = [(seed, budget, row) for budget in options.budgets for seed in options.seeds for row in wanted]
    paths = [folder / f"{row.replace(' ', '_').replace(',', '')}-{b}-{s}.json" for s, b, row in cases]
    for index, ((seed, budget, row), path) in enumerate(zip(cases, paths, strict=True)):
        if index % num_parts == part and not path.is_file():
            start = time.perf_counter()
            write_json(path, bench.measure(row, budget, seed))
            print(f"{row} {budget} seed {seed} in {time.perf_counter() - start:.0f} s", flush=True)
    found = [json.loads(path.read_text()) for path in paths if path.is_file()]
    write_report([entry for entry in found if entry is not None], options.label, origin(__file__, args), options.json)


if __name__ == "__main__":
    main()
