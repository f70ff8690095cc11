"""Few tokens, or the wrong ones: shrinkage, damping, and calibration of every expert on every token.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.few_tokens --json benchmarks/results/few_tokens.json

AGQ, group size 64.  ``kappa`` is how many effective samples of the block's pooled Hessian each expert's own gets;
``all experts`` makes the Hessians of all tokens (``--model.routing all_experts``), each with weight 1.  ``damping`` is
the share of the mean diagonal that is added to it (0.01 where an arm does not say; kappa is auto where it does not).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, ClassVar

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import CachedGridGPTQ, fit
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration

ARMS: dict[str, dict[str, Any]] = {
    "kappa 0": {"kappa": 0.0},
    "kappa 64": {"kappa": 64.0},
    "kappa 256": {"kappa": 256.0},
    "kappa 1024": {"kappa": 1024.0},
    "kappa auto": {},
    "all experts": {"routing": "all_experts"},
    "damping 0.03": {"damping": 0.03},
    "damping 0.1": {"damping": 0.1},
    "damping 0.3": {"damping": 0.3},
    "kappa 0, damping 0.1": {"kappa": 0.0, "damping": 0.1},
}


@dataclass(frozen=True)
class Case:
    """One calibration and quantization."""

    seed: int
    data: str
    num_windows: int
    bits: int
    arm: str


class FewTokens(Study[Case]):
    """Every arm on every set, size and width."""

    title = "Few tokens, or the wrong ones"
    legend = "Mean KL over the domains (worst domain) in thousandths of a nat, +- over seeds."
    quick: ClassVar = {
        "seeds": [0],
        "windows": [16],
        "sets": ["prose"],
        "bits": [3],
        "arms": ["kappa 0", "damping 0.1"],
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        names = list(ARMS)
        parser.add_argument("--windows", type=int, nargs="+", default=[16, 64], help=f"of {LENGTH} tokens")
        parser.add_argument("--sets", nargs="+", default=["prose", "corpus"], metavar="SET", help="of lab/sets.py")
        parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
        parser.add_argument("--arms", nargs="+", default=names, choices=names, metavar="ARM", help=", ".join(names))

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(*values) for values in product(o.seeds, o.sets, o.windows, o.bits, o.arms)]

    def measure(self, case: Case) -> Row:
        settings = dict(ARMS[case.arm])
        solver = CachedGridGPTQ(kappa=settings.pop("kappa", "auto"))
        ids_NL = calibration_set(self.yardstick, case.data, case.num_windows, case.seed, self.options.folder)
        steps = [BitAllocation(), HessianCalibration(), solver]
        module = fit(ids_NL, steps, name=MODEL, bits=case.bits, group_size=64, **settings)
        return {"domains": self.yardstick.row(module.model)}

    def report(self, rows: Sequence[Row]) -> str:
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        lines = []
        for setting, group in grouped(rows, lambda row: (row["data"], row["num_windows"], row["bits"])).items():
            by_arm = grouped(group, lambda row: row["arm"])
            data, num_windows, bits = setting
            lines.append([data, num_windows * LENGTH, bits, *(_cell(by_arm.get(arm, [])) for arm in arms)])
        return markdown(["set", "tokens", "bits", *arms], lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return f"{cell([1e3 * mean_kl(row) for row in rows], '.1f')} ({fmean(1e3 * worst_kl(row) for row in rows):.1f})"


if __name__ == "__main__":
    FewTokens.main()
