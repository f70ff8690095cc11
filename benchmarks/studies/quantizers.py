"""What each quantizer is worth: divergence from the original by domain, for every method, width and grid.

    OMP_NUM_THREADS=1 python benchmarks/quantizers.py --json benchmarks/results/quantizers.json

All on the bundled model and on data that the model wrote itself (EBSS, corpus mode, 64 sequences of 256 tokens), five
seeds, 2, 3 and 4 bits, in groups of 64 and per channel, asymmetric.  Results of single runs are kept in ``--folder`` as
they come, seed by seed, so that a stopped study goes on, and ``--share 0/2`` and ``--share 1/2`` in two processes
divide it; then ``--report`` writes the tables of what is there.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import LENGTH, calibration_set
from lightning.pytorch import Callback
from origin import origin
from quantizers_report import write_report
from trial import CachedGridGPTQ, Yardstick, fit

from callbacks.awq import AWQ
from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration
from callbacks.hqq import HQQ
from callbacks.learned_rounding import LearnedRounding
from callbacks.rotation import Rotation
from callbacks.router_calibration import RouterCalibration
from callbacks.rtn import RTN

MODEL = "assets/reference-moe"
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
    """One run of the study."""

    seed: int
    group_size: int | None
    bits: int
    arm: str
    rotation: bool

    @property
    def makes_sense(self) -> bool:
        """Methods without data do not depend on the seed; a rotation is tried with the plain methods."""
        arm = ARMS[self.arm]
        return (arm.uses_data or self.seed == 0) and (arm.rotated or not self.rotation)

    def path(self, folder: Path) -> Path:
        """Where its result is kept."""
        arm = self.arm.replace(", ", "-").replace(" ", "_") + ("-rotation" if self.rotation else "")
        return folder / f"{arm}-g{self.group_size or 0}-{self.bits}bit-{self.seed}.json"


def measure(yardstick: Yardstick, case: Case, ids_NL: torch.Tensor, folder: Path) -> None:
    """Calibrate, quantize, compare, and keep the result."""
    arm = ARMS[case.arm]
    steps = [*([Rotation()] if case.rotation else []), BitAllocation(), *arm.steps()]
    settings = {"bits": case.bits, "group_size": case.group_size, "affinity_power": 1.0, **arm.settings}
    if PEAK.exists():  # forget the peak so far
        PEAK.write_text("5")
    start, held = time.process_time(), _peak_mb()
    module = fit(ids_NL, steps, name=MODEL, **settings)
    seconds, peak = time.process_time() - start, _peak_mb() - held
    found = {domain: asdict(divergence) for domain, divergence in yardstick.measure(module.model).items()}
    row = {**asdict(case), "tokens": ids_NL.numel(), "seconds": seconds, "peak_mb": peak, "domains": found,
           "fallbacks": len(module.run.fallbacks)}  # fmt: skip
    temporary = case.path(folder).with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(case.path(folder))
    mean = sum(domain["kl"] for domain in found.values()) / len(found)
    print(f"{case} KL {mean:.4f} in {seconds:.0f} s", flush=True)


def run_missing(cases: Sequence[Case], num_windows: int, folder: Path, sets: Path) -> None:
    """Run the cases that have no result yet."""
    for each in (folder, sets):
        each.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(MODEL)
    for case in cases:
        if not case.path(folder).is_file():
            measure(yardstick, case, calibration_set(yardstick, "corpus", num_windows, case.seed, sets), folder)


def _peak_mb() -> float:
    """Resident memory at its peak since it was last forgotten, where the system says; else of the whole process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing of this share, then write the report where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 0], help="0 is one scale per channel")
    parser.add_argument("--windows", type=int, default=64, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--rotations", type=int, nargs="+", default=[0, 1], help="0 without, 1 with")
    parser.add_argument("--share", default="0/1", help="this process of so many: 0/2 and 1/2 divide the runs")
    parser.add_argument("--quick", action="store_true", help="AGQ at 3 bits, one seed, 8 sequences: about a minute")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantizers"), help="results of single runs")
    parser.add_argument("--sets", type=Path, default=Path("runs/ebss_effect"), help="sampled sets")
    parser.add_argument("--peers", type=Path, default=Path("benchmarks/results/peers.json"), help="to compare with")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is there")
    parser.add_argument("--json", type=Path, help="write all results here, and .md beside it")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.bits, options.groups, options.windows = [0], [3], [64], 8
        options.arms, options.rotations = ["AGQ"], [0]
    part, num_parts = map(int, options.share.split("/"))
    grid = product(options.seeds, options.groups, options.bits, options.arms, options.rotations)
    cases = [Case(seed, group or None, bits, arm, bool(turn)) for seed, group, bits, arm, turn in grid]
    cases = [case for case in cases if case.makes_sense]
    if not options.report:
        run_missing(cases[part::num_parts], options.windows, options.folder, options.sets)
    rows = [json.loads(case.path(options.folder).read_text()) for case in cases if case.path(options.folder).is_file()]
    peers = json.loads(options.peers.read_text())["rows"] if options.peers.is_file() else []
    write_report(rows, peers, origin(__file__, args), options.json)


if __name__ == "__main__":
    main()
