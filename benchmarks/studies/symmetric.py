"""What zero points are worth: asymmetric, symmetric and full-range symmetric grids, at equal widths and at equal sizes.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.symmetric --json benchmarks/results/symmetric.json

2, 3 and 4 bits in groups of 32, 64 and 128 (the experts' down projections have rows of 128), by rounding to nearest, by
AGQ on data that the model wrote itself (EBSS, corpus mode, 64 sequences of 256 tokens), and with learned rounding after
it.  More arms choose the ranges that AGQ starts from by the Hessian instead of the weights alone, or fit the scales to
the codes afterwards.  Beside 4 bits in
groups of 32 stand tables of levels, NVFP4 in groups of 16; scales of tables are fitted to the codes in every arm.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from callbacks.bit_allocation import BitAllocation
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.rtn import RTN
from moeq.allocation.price import file_cost
from moeq.allocation.runtime import RUNTIMES
from moeq.fit.solve import Unit
from moeq.module import MoEQuantModule
from moeq.quant.clip import clip_by_output_error
from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import QParams
from moeq.quant.scale_refit import refit_scales
from moeq.quant.solution import Solution

GRIDS: dict[str, dict[str, Any]] = {
    "asymmetric": {}, "symmetric": {"symmetric": True}, "full-range": {"grid": "full_range"},
    "IQ4_NL": {"grid": "iq4_nl"}, "MXFP4": {"grid": "mxfp4"}, "NVFP4": {"grid": "nvfp4", "group_size": 16},
}  # fmt: skip
BY_TABLE = {"IQ4_NL": RUNTIMES["llama.cpp"], "MXFP4": RUNTIMES["vllm"], "NVFP4": RUNTIMES["vllm"]}  # whose files count
METHODS = (
    "RTN", "AGQ", "AGQ, ranges by output error", "AGQ, ranges by input energy", "AGQ, refitted scales", "AGQ, learned",
)  # fmt: skip
WITHOUT_DATA = METHODS[:1]


class RangedGPTQ(GPTQ):
    """GPTQ on ranges with the least output error of each group, or with the diagonal of the Hessian in its place."""

    affects_weights = False

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        dtype = module.adapter.storage_dtype
        judge_EII = hessian_EII if self.whole else torch.diag_embed(hessian_EII.diagonal(dim1=1, dim2=2))
        qparams = clip_by_output_error(weight_EOI, judge_EII, unit.grid, dtype)
        return gptq_solve(weight_EOI, hessian_EII, unit.grid, module.solve_spec, dtype, qparams=qparams)


class RefittedGPTQ(CachedGridGPTQ):
    """GPTQ, and the scales of all groups once more for the codes that it chose."""

    affects_weights = False

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        solution = super().solve(module, unit, weight_EOI, hessian_EII)
        known = QParams(solution.scale_EOG, solution.zero_point_EOG)
        fitted, _ = refit_scales(weight_EOI, hessian_EII.float(), solution.codes_EOI, known, unit.grid)
        return replace(solution, scale_EOG=fitted.scale_EOG)


@dataclass(frozen=True)
class Case:
    """One quantization."""

    seed: int
    bits: int
    group_size: int
    grid: str
    method: str

    def steps(self) -> list[Callback]:
        """Callbacks of the fit."""
        if self.method == "RTN":
            return [BitAllocation(), RTN()]
        ranged = {METHODS[2]: True, METHODS[3]: False}
        solver = RangedGPTQ(whole=ranged[self.method]) if self.method in ranged else CachedGridGPTQ()
        if self.method == METHODS[4]:
            solver = RefittedGPTQ()
        learned = [LearnedRounding()] if self.method.endswith("learned") else []
        return [BitAllocation(), HessianCalibration(), solver, *learned]


class Symmetric(Study[Case]):
    """Three kinds of grids, each at its true size."""

    title = "What zero points are worth"
    legend = (
        "KL to the original in thousandths of a nat per token, mean over the domains and the worst, +- over seeds; "
        "bits with scales and zero points. Asymmetric of that size: at as many bits, between "
        "two group sizes linearly in the logarithm. The scale of a full-range group has a sign, so that the largest "
        "weight can have the lowest level."
    )
    quick: ClassVar = {"seeds": [0], "bits": [3], "groups": [64], "methods": ["RTN"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
        parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
        parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
        parser.add_argument("--sets", type=Path, default=Path("runs/calibration_data"), help="sampled sets")

    def cases(self) -> list[Case]:
        asked, once = self.options, self.options.seeds[0]
        return [
            Case(seed, bits, group_size, grid, method)
            for seed in asked.seeds
            for method in asked.methods
            if seed == once or method not in WITHOUT_DATA
            for bits in asked.bits
            for group_size in asked.groups
            for grid in asked.grids
            if grid not in BY_TABLE or ((bits, group_size) == (4, 32) and method in METHODS[:2])
        ]

    def measure(self, case: Case) -> Row:
        self.options.sets.mkdir(parents=True, exist_ok=True)
        ids_NL = calibration_set(self.yardstick, "corpus", 64, case.seed, self.options.sets)
        sizes = {"bits": case.bits, "group_size": case.group_size, **GRIDS[case.grid]}
        module = fit(ids_NL, case.steps(), name=MODEL, affinity_power=1.0, damping=0.1, **sizes)
        files = BY_TABLE.get(case.grid, RUNTIMES["research"])
        size = file_cost(module.run.plan, module.weight_shapes(), files).average_bits
        return {"domains": self.yardstick.row(module.model), "size": size}

    def report(self, rows: Sequence[Row]) -> str:
        cells = grouped(rows, lambda row: (row["method"], row["bits"], row["group_size"], row["grid"]))
        means = {key: (found[0]["size"], sum(map(mean_kl, found)) / len(found)) for key, found in cells.items()}
        order = {name: place for place, name in enumerate((*METHODS, *GRIDS))}
        lines = []
        for key in sorted(cells, key=lambda key: (order[key[0]], key[1], key[2], order[key[3]])):
            method, bits, group_size, grid = key
            asymmetric = [means[k] for k in means if k[:2] == key[:2] and k[3] == "asymmetric"]
            beside = None if grid == "asymmetric" else at_size(asymmetric, means[key][0])
            lines.append([
                method, bits, group_size, grid, f"{means[key][0]:.4g}", len(cells[key]),
                cell([1e3 * mean_kl(row) for row in cells[key]], ".2f"),
                cell([1e3 * worst_kl(row) for row in cells[key]], ".2f"),
                "" if beside is None else f"{1e3 * beside:.2f}",
            ])  # fmt: skip
        head = ["codes", "width", "groups of", "grid", "bits", "seeds", "mean KL", "worst domain"]
        return markdown([*head, "asymmetric of that size"], lines)


def at_size(known: Sequence[tuple[float, float]], size: float) -> float | None:
    """Divergence at a size from (size, divergence) of others, linear in its logarithm; None outside of their range."""
    known = sorted(known)
    for (low, first), (high, second) in pairwise(known):
        if low <= size <= high:
            share = (size - low) / (high - low)
            return math.exp((1 - share) * math.log(first) + share * math.log(second))
    return None


if __name__ == "__main__":
    Symmetric.main()
