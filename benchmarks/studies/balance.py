r"""Where expert balance matters: plain self-sampling against EBSS by set size, on the worst domain and expert.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.balance --folder runs/calibration_data \
        --json benchmarks/results/balance.json

3 bits, AGQ.  ``plain`` is sampling without any balance, ``stochastic`` the balanced choice among the branches of a
sequence, ``corpus`` the set that is steered as a whole, ``corpus without balance`` its search without steering.
Expert errors are relative output errors of single experts on evaluation text.  Sampled sets are read from ``--folder``
where another study left them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import ClassVar

from benchmarks.lab.sets import LENGTH, SAMPLED, sampled_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown, mean_kl, worst_kl
from benchmarks.lab.trial import fit
from benchmarks.lab.yardstick import Yardstick
from moeq.sampling.effective import measure_evidence

ARMS = {
    "plain": SAMPLED["plain"],
    "stochastic": SAMPLED["stochastic"],
    "corpus": SAMPLED["corpus"],
    "corpus without balance": replace(SAMPLED["corpus"], balance=False),
}
COLUMNS = ("mean KL", "worst-domain KL", "mean expert error", "worst expert error", "least effective samples")


@dataclass(frozen=True)
class Case:
    """One calibration and quantization."""

    model: str
    num_windows: int
    arm: str
    seed: int


class Balance(Study[Case]):
    """Every kind of sampling at every size."""

    title = "Where expert balance matters"
    legend = "3 bits, AGQ; +- over seeds."
    quick: ClassVar = {"seeds": [0], "windows": [8], "arms": ["plain", "corpus"]}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default=MODEL, help="folder of a model with the same tokenizer")
        parser.add_argument("--windows", type=int, nargs="+", default=[8, 32], help=f"of {LENGTH} tokens")
        parser.add_argument(
            "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=str([*ARMS])
        )

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.options.model)

    def cases(self) -> list[Case]:
        o = self.options
        return [Case(o.model, *values) for values in product(o.windows, o.arms, o.seeds)]

    def measure(self, case: Case) -> Row:
        yardstick, largest = self.yardstick, max(self.options.windows)
        ids_NL = sampled_set(
            yardstick, ARMS[case.arm], case.arm, case.seed, self.options.folder, case.num_windows, largest
        )
        module = fit(ids_NL, name=case.model, bits=3, group_size=64, affinity_power=1.0)
        return {
            "domains": yardstick.row(module.model),
            "expert_errors": yardstick.expert_errors(module.model).tolist(),
            "least_effective": float(measure_evidence(yardstick.model, ids_NL).effective_LE().min()),
        }

    def report(self, rows: Sequence[Row]) -> str:
        lines = []
        for (num_windows, arm), group in grouped(rows, lambda row: (row["num_windows"], row["arm"])).items():
            errors = [row["expert_errors"] for row in group]
            columns = [
                [mean_kl(row) for row in group], [worst_kl(row) for row in group],
                [sum(each) / len(each) for each in errors], [max(each) for each in errors],
                [row["least_effective"] for row in group],
            ]  # fmt: skip
            lines.append([num_windows * LENGTH, arm, *(cell(values, ".3g", ".2g") for values in columns)])
        return markdown(["tokens", "set", *COLUMNS], lines)


if __name__ == "__main__":
    Balance.main()
