"""What llama.cpp's own grids are worth, and how their two levels of scales are best chosen.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.grids --json benchmarks/results/grids.json

Q4_K, Q3_K and Q2_K beside uniform grids of about their size, on the bundled model and data that it wrote itself (EBSS,
corpus mode, 64 sequences of 256 tokens), affinity-weighted Hessians.  The experts' down projections, whose rows are no
multiples of 256, stay as they are in every case, so that all grids hold the same weights.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import fit
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from moeq.allocation.patterns import Pattern
from moeq.allocation.plan import Choice, plan_cost
from moeq.fit.solve import Unit
from moeq.module import MoEQuantModule
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams
from moeq.quant.rtn import round_to_nearest
from moeq.quant.solution import Solution
from moeq.quant.two_level_search import ROUNDS, choose_two_level

KEPT = Pattern("*.experts.*.down_proj", keep=True)
# How codes and scales are chosen; "llama.cpp" is its quantizer's search, "imat" with the Hessian's diagonal.
ARMS = (
    "llama.cpp", "llama.cpp, imat", "GPTQ on llama.cpp's scales", "GPTQ on descended scales", "GPTQ, refitted",
)  # fmt: skip
UNIFORM_ARM = "GPTQ"
WITHOUT_DATA, ONE_SEED = ARMS[:1], ("GPTQ on descended scales",)
GRIDS = {"q4_k": "4g32 symmetric", "q3_k": "3g32", "q2_k": "2g32"}  # each beside a uniform one of about its size


class CommittedGPTQ(GPTQ):
    """GPTQ, or rounding, on two-level scales that one of the arms commits."""

    affects_weights = False

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm = arm

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        dtype, grid = module.adapter.storage_dtype, unit.grid
        if self.arm == UNIFORM_ARM or "refitted" in self.arm:
            return super().solve(module, unit, weight_EOI, hessian_EII)
        importance_EI = None if self.arm == "llama.cpp" else hessian_EII.diagonal(dim1=1, dim2=2)
        rounds = ROUNDS if "descended" in self.arm else 0
        qparams = QParams(*choose_two_level(weight_EOI, grid, dtype, importance_EI, rounds))
        if self.arm.startswith("llama.cpp"):
            return round_to_nearest(weight_EOI, grid, dtype, hessian_EII, qparams)
        return gptq_solve(weight_EOI, hessian_EII, grid, module.solve_spec, dtype, qparams=qparams)


@dataclass(frozen=True)
class Case:
    """One quantization."""

    seed: int
    grid: str
    arm: str

    @property
    def settings(self) -> dict[str, object]:
        """Of the module."""
        if self.grid in GRIDS:
            return {"grid": self.grid}
        label, _, symmetric = self.grid.partition(" ")
        choice = Choice.from_label(label)
        return {"bits": choice.bits, "group_size": choice.group_size, "symmetric": bool(symmetric)}


class Grids(Study[Case]):
    """Two-level grids beside uniform ones."""

    title = "What llama.cpp's own grids are worth"
    legend = (
        "KL to the original in thousandths of a nat per token, mean over the domains and the worst, +- over seeds; "
        "bits with scales and zero points. llama.cpp: rounding on the scales of its search (moeq's own code), with "
        "importances (imat) by the Hessian's diagonal. GPTQ on the same scales; on scales that were descended on by "
        "the same importances; and refitted: with integers that are fitted to the codes by the whole Hessian, which "
        "is what a run does."
    )
    quick: ClassVar = {"seeds": [0], "grids": ["q3_k"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        known = [*GRIDS, *GRIDS.values()]
        parser.add_argument("--grids", nargs="+", default=known, choices=known, metavar="GRID", help=", ".join(known))
        parser.add_argument("--sets", type=Path, default=Path("runs/calibration_data"), help="sampled sets")

    def cases(self) -> list[Case]:
        arms = [(grid, arm) for grid in self.options.grids for arm in (ARMS if grid in GRIDS else (UNIFORM_ARM,))]
        once = self.options.seeds[0]
        cases = [Case(seed, *arm) for seed in self.options.seeds for arm in arms]
        return [case for case in cases if case.seed == once or case.arm not in (*WITHOUT_DATA, *ONE_SEED)]

    def measure(self, case: Case) -> Row:
        self.options.sets.mkdir(parents=True, exist_ok=True)
        ids_NL = calibration_set(self.yardstick, "corpus", 64, case.seed, self.options.sets)
        steps = [BitAllocation(patterns=[KEPT]), HessianCalibration(), CommittedGPTQ(case.arm)]
        module = fit(ids_NL, steps, name=MODEL, affinity_power=1.0, damping=0.1, **case.settings)
        bits = plan_cost(module.run.plan, module.weight_shapes()).average_bits
        return {"domains": self.yardstick.row(module.model), "bits": bits}

    def report(self, rows: Sequence[Row]) -> str:
        lines = []
        for (grid, arm), group in sorted(grouped(rows, lambda row: (row["grid"], row["arm"])).items(), key=_place):
            mean = cell([1e3 * mean_kl(row) for row in group], ".2f")
            lines.append([grid, f"{group[0]['bits']:.4g}", arm, len(group), mean,
                          cell([1e3 * worst_kl(row) for row in group], ".2f")])  # fmt: skip
        return markdown(["grid", "bits", "scales and codes", "seeds", "mean KL", "worst domain"], lines)


def _place(item: tuple[tuple[str, str], list[Row]]) -> tuple[int, int]:
    """From many bits to few; uniform grids behind the one of about their size."""
    grid, arm = item[0]
    two_level = next(kind for kind, beside in GRIDS.items() if grid in (kind, beside))
    return [*GRIDS].index(two_level), (ARMS.index(arm) if grid in GRIDS else len(ARMS))


if __name__ == "__main__":
    Grids.main()
