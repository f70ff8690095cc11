"""What each quantizer is worth: divergence from the original by domain, for every method, width and grid.

    OMP_NUM_THREADS=1 python -m benchmarks.studies.quantizers --json benchmarks/results/quantizers.json

All on the bundled model and on data that the model wrote itself (EBSS, corpus mode, 64 sequences of 256 tokens), five
seeds, 2, 3 and 4 bits, in groups of 64 and per channel, asymmetric.  Cases come seed by seed.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback

from benchmarks.lab.sets import LENGTH, calibration_set
from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row
from benchmarks.lab.trial import CachedGridGPTQ, fit
from benchmarks.studies.quantizers_report import against_peers, method_tables
from callbacks.awq import AWQ
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration
from callbacks.hqq import HQQ
from callbacks.learned_rounding import LearnedRounding
from callbacks.rotation import Rotation
from callbacks.router_calibration import RouterCalibration
from callbacks.rtn import RTN

PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Arm:
    """A method: its callbacks, and the settings of the module that go with it."""

    steps: Callable[[], list[Callback]]
    settings: dict[str, Any] = field(default_factory=dict)
    uses_data: bool = True
    rotated: bool = True


def _hessians(*steps: Callback) -> list[Callback]:
    return [HessianCalibration(), *steps]


ARMS: dict[str, Arm] = {
    "RTN": Arm(lambda: [RTN()], uses_data=False),
    "HQQ": Arm(lambda: [HQQ()], uses_data=False),
    "GPTQ": Arm(lambda: _hessians(CachedGridGPTQ()), {"affinity_power": 0.0}),
    "AGQ": Arm(lambda: _hessians(CachedGridGPTQ())),
    "AGQ, power 2": Arm(lambda: _hessians(CachedGridGPTQ()), {"affinity_power": 2.0}),
    "AWQ": Arm(lambda: _hessians(AWQ()), {"affinity_power": 0.0}),
    "AGQ-AWQ": Arm(lambda: _hessians(AWQ())),
    "AGQ, no shrinkage": Arm(lambda: _hessians(CachedGridGPTQ(kappa=0.0)), rotated=False),
    "GPTQ, no shrinkage": Arm(lambda: _hessians(CachedGridGPTQ(kappa=0.0)), {"affinity_power": 0.0}, rotated=False),
    "GPTQ, all experts": Arm(
        lambda: _hessians(CachedGridGPTQ()), {"affinity_power": 0.0, "routing": "all_experts"}, rotated=False
    ),
    "AGQ, router": Arm(lambda: [RouterCalibration(), *_hessians(CachedGridGPTQ())], rotated=False),
    "AGQ-AWQ, router": Arm(lambda: [RouterCalibration(), *_hessians(AWQ())], rotated=False),
    "AGQ, router, learned": Arm(
        lambda: [RouterCalibration(), *_hessians(CachedGridGPTQ(), LearnedRounding())], rotated=False
    ),
    "AGQ, damping 0.1": Arm(lambda: _hessians(CachedGridGPTQ()), {"damping": 0.1}, rotated=False),
    "AGQ, damping 0.1, router": Arm(
        lambda: [RouterCalibration(), *_hessians(CachedGridGPTQ())], {"damping": 0.1}, rotated=False
    ),
    "AGQ, damping 0.1, router, learned": Arm(
        lambda: [RouterCalibration(), *_hessians(CachedGridGPTQ(), LearnedRounding())], {"damping": 0.1}, rotated=False
    ),
}


@dataclass(frozen=True)
class Case:
    """One quantization."""

    seed: int
    num_windows: int
    group_size: int | None
    bits: int
    arm: str
    rotation: bool

    @property
    def makes_sense(self) -> bool:
        """Methods without data do not depend on the seed; a rotation is tried with the plain methods."""
        arm = ARMS[self.arm]
        return (arm.uses_data or self.seed == 0) and (arm.rotated or not self.rotation)


class Quantizers(Study[Case]):
    """Every method on every grid, beside what other quantizers reach."""

    title = "What each quantizer is worth"
    legend = (
        "Bundled model; KL to the original in thousandths of a nat per token, mean and standard deviation over seeds; "
        "32 windows of 256 tokens of each domain. Calibration: tokens that the model wrote itself. Seconds are of one "
        "core, peak memory is what a fit adds to the process."
    )
    seeds = (0, 1, 2, 3, 4)
    quick: ClassVar = {
        "seeds": [0], "bits": [3], "groups": [64], "windows": 8, "arms": ["RTN", "AGQ"], "rotations": [0]
    }  # fmt: skip

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=str([*ARMS])
        )
        parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
        parser.add_argument("--groups", type=int, nargs="+", default=[64, 0], help="0 is one scale per channel")
        parser.add_argument("--windows", type=int, default=64, help=f"sequences of {LENGTH} tokens")
        parser.add_argument("--rotations", type=int, nargs="+", default=[0, 1], help="0 without, 1 with")
        parser.add_argument("--sets", type=Path, default=Path("runs/calibration_data"), help="sampled sets")
        parser.add_argument("--peers", type=Path, default=Path("benchmarks/results/peers.json"), help="to compare with")

    def cases(self) -> list[Case]:
        o = self.options
        grid = product(
            o.seeds, [o.windows], [group or None for group in o.groups], o.bits, o.arms, map(bool, o.rotations)
        )
        return [case for case in (Case(*values) for values in grid) if case.makes_sense]

    def measure(self, case: Case) -> Row:
        arm, sets = ARMS[case.arm], self.options.sets
        sets.mkdir(parents=True, exist_ok=True)
        ids_NL = calibration_set(self.yardstick, "corpus", case.num_windows, case.seed, sets)
        steps = [*([Rotation()] if case.rotation else []), BitAllocation(), *arm.steps()]
        settings = {"bits": case.bits, "group_size": case.group_size, "affinity_power": 1.0, **arm.settings}
        if PEAK.exists():  # forget the peak so far
            PEAK.write_text("5")
        start, held = time.process_time(), _peak_mb()
        module = fit(ids_NL, steps, name=MODEL, **settings)
        seconds, peak = time.process_time() - start, _peak_mb() - held
        return {
            "tokens": ids_NL.numel(), "seconds": seconds, "peak_mb": peak, "domains": self.yardstick.row(module.model),
            "fallbacks": len(module.run.fallbacks),
        }  # fmt: skip

    def report(self, rows: Sequence[Row]) -> str:
        peers = json.loads(self.options.peers.read_text())["rows"] if self.options.peers.is_file() else []
        return f"{against_peers(rows, peers)}\n{method_tables(rows)}"


def _peak_mb() -> float:
    """Resident memory at its peak since it was last forgotten, where the system says; else of the whole process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    Quantizers.main()
