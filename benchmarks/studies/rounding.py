"""How levels are best learned: choices of levels, errors and steps, at equal numbers of steps and tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.rounding --json benchmarks/results/rounding.json

Learned rounding on AGQ-GPTQ, on the bundled model and data that it wrote itself (EBSS, corpus mode, sequences of 256
tokens), groups of 64, asymmetric.  Cases are kept one by one and come seed by seed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from lightning.pytorch import Callback

from benchmarks.lab.sets import calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, router_agreement, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from benchmarks.peers.gsq import GumbelRounding, GumbelSpec
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding

ARMS: dict[str, Callable[[], list[Callback]]] = {
    "GPTQ": list,
    "straight-through, 0.01": lambda: [LearnedRounding(softness=0.0, level_rate=0.01)],
    "soft": lambda: [LearnedRounding(softness=0.33, level_rate=0.03)],
    "GSQ": lambda: [GumbelRounding()],
    "GSQ, no noise": lambda: [GumbelRounding(GumbelSpec(noisy=False))],
}


@dataclass(frozen=True)
class Case:
    """One quantization."""

    seed: int
    bits: int
    num_windows: int
    arm: str


class Rounding(Study[Case]):
    """Ways to learn the rounding of a block."""

    title = "How levels are best learned"
    legend = (
        "KL to the original in thousandths of a nat per token, mean over the domains and the worst, +- over seeds; "
        "router agreement in percent; seconds of one core for the whole fit. All arms start from the same GPTQ and "
        "take 100 steps of Adam on each block, one batch of 8 sequences each, where their name says nothing else. "
        "straight-through: gradients pass the rounding unchanged, with this step size in levels; soft: the level is a "
        "mean of codes that ends on one. GSQ: its choice of levels, ours, written from the paper "
        "(benchmarks/peers/gsq.py)."
    )
    quick: ClassVar = {"seeds": [0], "bits": [2], "arms": ["GPTQ", "soft"]}
    keeps = True

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--windows", type=int, nargs="+", default=[64], help="sequences of 256 tokens")
        known = list(ARMS)
        parser.add_argument("--arms", nargs="+", default=known, choices=known, metavar="ARM", help=str(known))
        parser.add_argument("--sets", type=Path, default=Path("runs/calibration_data"), help="sampled sets")

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(*values) for values in product(o.seeds, o.bits, o.windows, o.arms)]

    def measure(self, case: Case) -> Row:
        self.options.sets.mkdir(parents=True, exist_ok=True)
        ids_NL = calibration_set(self.yardstick, "corpus", case.num_windows, case.seed, self.options.sets)
        steps = [BitAllocation(), HessianCalibration(), CachedGridGPTQ(), *ARMS[case.arm]()]
        start = time.process_time()
        module = fit(ids_NL, steps, name=MODEL, bits=case.bits, group_size=64, affinity_power=1.0, damping=0.1)
        return {"domains": self.yardstick.row(module.model), "seconds": time.process_time() - start}

    def report(self, rows: Sequence[Row]) -> str:
        lines = []
        for (bits, num_windows, arm), group in sorted(grouped(rows, _place).items()):
            mean, worst = (cell([1e3 * of(row) for row in group], ".2f") for of in (mean_kl, worst_kl))
            agreement = cell([100 * router_agreement(row) for row in group], ".1f")
            seconds = f"{fmean(row['seconds'] for row in group):.0f}"
            lines.append([bits, num_windows, [*ARMS][arm], len(group), mean, worst, agreement, seconds])
        return markdown(["bits", "sequences", "levels", "seeds", "mean KL", "worst domain", "router", "seconds"], lines)


def _place(row: Row) -> tuple[int, int, int]:
    """Few bits and little data first, arms in their order."""
    return row["bits"], row["num_windows"], [*ARMS].index(row["arm"])


if __name__ == "__main__":
    Rounding.main()
