"""How many bits the same divergence takes: recipes of moeq from 2 to 4 bits on average, beside other quantizers.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.one_bit_less --json benchmarks/results/one_bit_less.json
    ... --models runs/mixtral_moe/model    # after make mixtral-model
    ... --tasks-dir DATA                   # tasks as well, from the folder that docs/tasks.md describes

Every case is the command that a user types, ``main.py fit`` with a configuration of ``configs/``, in a process of its
own; its export is loaded like any model and compared with the original on four domains.  Rows of other quantizers are
those of ``benchmarks.studies.peers``: with the mixture of the evaluated domains, and with what the model wrote.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import yaml

from benchmarks.lab.provenance import ROOT
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.yardstick import Yardstick
from benchmarks.studies.one_bit_less_report import BEST, BEST_BY_SIZE, bars, table
from moeq.checkpoint.loading import load_model
from moeq.report.results import read_results
from moeq.survey.kronecker_preflight import KIND

BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0)


@dataclass(frozen=True)
class Recipe:
    """A configuration and what is changed in it.

    Attributes:
        config: File of ``configs/``; ``{bits}`` is the whole width below the budget.
        uniform: Has one width for all weights, so that it exists at whole bits only; else a budget is allocated.
        without: Steps that are taken out.
        data, model: Settings that are changed.
        group_size: Of all choices, where it is not that of the configuration; the budget then is the size of a plan in
            groups of 64, with scales and zero points.
        seeded: Whether the data are drawn by a seed.
    """

    config: str
    uniform: bool = True
    without: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    group_size: int | None = None
    seeded: bool = True


RECIPES: dict[str, Recipe] = {
    "RTN": Recipe("rtn_w3.yaml", seeded=False),
    "GPTQ (prose)": Recipe("gptq_text_w3.yaml"),
    "MoEQuant as in the paper": Recipe(
        "moequant_w3.yaml", without=("RouterCalibration",), data={"mode": "paper"}, model={"damping": 0.01}
    ),
    "moeq, default": Recipe("moequant_w3.yaml"),
    "moeq, allocated": Recipe("moequant_allocated_w3.yaml", uniform=False),
    BEST: Recipe("moequant_best_w{bits}.yaml", uniform=False),
    BEST_BY_SIZE: Recipe("moequant_best_w{bits}.yaml", uniform=False, group_size=128),
}


@dataclass(frozen=True)
class Case:
    """One fit."""

    seed: int
    model: str
    bits: float
    recipe: str


class OneBitLess(Study[Case]):
    """Every recipe at every budget."""

    title = "One bit less"
    legend = (
        "KL to the original in nats a token, mean and worst of four domains (32 windows of 256 tokens), +- over "
        "seeds; bits of codes on average over the quantized weights, and with scales and zero points; groups of 64, "
        "but where it says 128: these are as large as plans in groups of 64 with so many bits of codes. "
        "Processor seconds and peak of resident memory are of the whole fit command, its sampling, export and "
        "verification included, on a machine with other work (which makes them up to twice as many); those of other "
        "quantizers as they report them, in part on a processor without bfloat16 products, where they take some ten "
        "times as many; + F where some took Kronecker factors, which are the same at every budget, "
        "from a folder in which an earlier fit had kept them. Tasks, of the seeds that ran them (often one), are those "
        "of the catalog in which the bundled original is more than two standard errors above chance on 1,000 "
        "documents: sums, sciq (57.1 +- 1.6%), lambada_openai (5.2 +- 0.7%), piqa (53.8 +- 1.6%); not arc, hellaswag, "
        "openbookqa, winogrande, copa, and boolq only below its larger class. Of the original Mixtral, 300 documents: "
        "sums 95.5%, sciq 43.7 +- 2.9%, lambada_openai 1.3 +- 0.7%, piqa 56.3 +- 2.9%. The best has one bit among its "
        "choices below 4 bits; its rows below 3 bits are of soft levels that hardened linearly (LOG.md, 2026-12-01)."
    )
    quick: ClassVar = {"seeds": [0], "budgets": [3.0], "recipes": ["RTN", "moeq, default"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--models", nargs="+", default=[MODEL], help="folders of models with the bundled tokenizer")
        parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), choices=BUDGETS)
        parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
        parser.add_argument("--tasks", nargs="+", default=["sums"], help="of docs/tasks.md")
        parser.add_argument("--tasks-dir", type=Path, help="their data; without it only sums, which are bundled")
        parser.add_argument("--documents", type=int, default=1000, help="of each task")
        parser.add_argument(
            "--peers",
            type=Path,
            nargs="*",
            default=[Path("benchmarks/results/peers.json")],
            help="rows to compare with",
        )

    def cases(self) -> list[Case]:
        o = self.options
        every = [
            Case(seed, model, bits, recipe)
            for model in o.models for seed in o.seeds for bits in o.budgets for recipe in o.recipes
        ]  # fmt: skip
        return [case for case in every if self._exists(case)]

    def _exists(self, case: Case) -> bool:
        recipe = RECIPES[case.recipe]
        once = recipe.seeded or case.seed == self.options.seeds[0]
        return once and (not recipe.uniform or case.bits == int(case.bits))

    def measure(self, case: Case) -> Row:
        with TemporaryDirectory(dir=self.options.folder) as temporary:
            folder = Path(temporary)
            config = folder / "config.yaml"
            settings = configuration(case, folder, self.options.folder / "factors")
            config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf8")
            cost = run_measured(["fit", "--config", str(config)]) | factors_cost(settings, folder)
            export = folder / "export"
            domains = measure_of(case.model).row(load_model(str(export), "auto"))
            return {**cost, "domains": domains, **self._tasks(export, folder)}

    def _tasks(self, export: Path, folder: Path) -> Row:
        """Sizes and accuracies of tasks, by ``main.py validate``."""
        o = self.options
        tasks, data = (o.tasks, o.tasks_dir) if o.tasks_dir else (["sums"], ROOT / "assets/reference-moe/texts")
        run_measured([
            "validate", "--config", "configs/eval_moequant.yaml", "--model.name", str(export),
            "--data.data_dir", str(data), "--data.tasks", json.dumps(tasks), "--data.num_documents", str(o.documents),
            "--trainer.default_root_dir", str(folder / "tasks"),
        ])  # fmt: skip
        row = read_results(folder / "tasks" / "results.json")[0]
        accuracy = dict(row.accuracy or {})
        if row.exact_match is not None:
            accuracy["sums"] = row.exact_match
        return {"average_bits": row.average_bits, "bytes": row.bytes, "accuracy": accuracy}

    def report(self, rows: Sequence[Row]) -> str:
        peers = [row for path in self.options.peers for row in json.loads(path.read_text())["rows"]]
        models = dict.fromkeys(row["model"] for row in rows)
        parts = []
        for model in models:
            own = [row for row in rows if row["model"] == model]
            others = [row for row in peers if row.get("model", MODEL) == model and row["group"] == 64]
            parts.append(f"## {model}\n\n{bars(own, others)}\n{table(own, others)}")
        return "\n".join(parts)


@cache
def measure_of(model: str) -> Yardstick:
    """The evaluation texts with the logits of an original."""
    return Yardstick(model)


def configuration(case: Case, folder: Path, factors: Path) -> dict[str, Any]:
    """The configuration of a case: that of its recipe with another model, budget, seed and run folder.

    Args:
        case: Which.
        folder: Of the run.
        factors: Keeps Kronecker factors, which are the same at every budget.
    """
    recipe = RECIPES[case.recipe]
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / recipe.config.format(bits=int(case.bits))).read_text())
    steps = [step for step in config["trainer"]["callbacks"] if step["class_path"] not in recipe.without]
    config["trainer"] |= {"default_root_dir": str(folder), "callbacks": steps, "enable_progress_bar": False}
    config["model"] |= {"name": case.model, **recipe.model}
    if recipe.uniform:
        config["model"]["bits"] = int(case.bits)
    else:
        change_budget(steps, case.bits, recipe.group_size)
    config["data"]["init_args"] |= {"seed": case.seed, **recipe.data}
    for step in steps:
        if step["class_path"] == "KroneckerFactors":
            step["init_args"] = {**step.get("init_args", {}), "seed": case.seed, "folder": str(factors.resolve())}
    return config


def change_budget(steps: Sequence[dict[str, Any]], bits: float, group_size: int | None) -> None:
    """Give the steps of an allocation a budget, in place.

    Args:
        steps: Callbacks of a configuration.
        bits: Of codes, on average.
        group_size: None keeps the groups of the configuration.  Else that of all choices, and the budget is what so
            many bits take in groups of 64, each with a scale of 16 bits and a zero point as wide as a code.
    """
    init_args = {step["class_path"]: step.get("init_args", {}) for step in steps}
    allocation = init_args["BitAllocation"]
    allocation["budget"] = bits
    if group_size is not None:
        choices = [f"{width}g{group_size}" for width in allocation["choices"]]
        allocation |= {"budget": bits + (16 + bits) / 64, "budget_unit": "average_bits", "choices": choices}
        init_args["Survey"]["choices"] = choices


def factors_cost(settings: Mapping[str, Any], folder: Path) -> Row:
    """Seconds that a finished fit took to gather factors; None where it took those of an earlier one."""
    if not any(step["class_path"] == "KroneckerFactors" for step in settings["trainer"]["callbacks"]):
        return {}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf8"))
    return {"factors_seconds": manifest["seconds"].get(KIND)}


def run_measured(args: Sequence[str]) -> Row:
    """Run ``main.py`` in a process of its own; seconds and peak memory of it.

    Raises:
        RuntimeError: It failed; the end of what it printed is in the message.
    """
    start = time.perf_counter()
    with TemporaryDirectory() as temporary, (Path(temporary) / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "main.py", *args], stdout=log, stderr=log, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"main.py {' '.join(args)} failed:\n{log.read()[-2000:]}")
    return {
        "seconds": time.perf_counter() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
    }  # fmt: skip


if __name__ == "__main__":
    OneBitLess.main()
