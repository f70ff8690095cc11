"""What calibration data is worth: divergence from the original by domain, after GPTQ and AGQ on four kinds of data.

    OMP_NUM_THREADS=1 python benchmarks/ebss_effect.py --json benchmarks/results/ebss.json

Data: prose alone; the mixture of all evaluated domains (an oracle: who has a real model does not know them); EBSS in
paper mode; EBSS in corpus mode.  Five seeds, 3 and 4 bits in groups of 64, 8k, 32k and 128k tokens.  Results of single
runs are kept in ``--folder`` as they come, so that a stopped study goes on, and ``--share 0/2`` and ``--share 1/2`` in
two processes divide it; then run it once more without a share for the table and the figure.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import LENGTH, calibration_set
from ebss_effect_report import write_report
from origin import origin
from trial import Yardstick, fit

MODEL = "assets/reference-moe"


@dataclass(frozen=True, order=True)
class Case:
    """One run of the study."""

    num_windows: int
    seed: int
    arm: str
    bits: int
    affinity_power: int

    def path(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.arm}-{self.num_windows}-{self.seed}-{self.bits}bit-power{self.affinity_power}.json"


def measure(yardstick: Yardstick, case: Case, folder: Path, num_written: int) -> None:
    """Calibrate, quantize, compare, and keep the result."""
    start = time.perf_counter()
    ids_NL = calibration_set(yardstick, case.arm, case.num_windows, case.seed, folder, num_written)
    module = fit(ids_NL, name=MODEL, bits=case.bits, group_size=64, affinity_power=float(case.affinity_power))
    found = {domain: asdict(divergence) for domain, divergence in yardstick.measure(module.model).items()}
    row = {**asdict(case), "tokens": case.num_windows * LENGTH, "domains": found}
    temporary = case.path(folder).with_suffix(".tmp")
    temporary.write_text(json.dumps(row))
    temporary.replace(case.path(folder))
    mean = sum(domain["kl"] for domain in found.values()) / len(found)
    print(f"{case} KL {mean:.4f} in {time.perf_counter() - start:.0f} s", flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing of this share, then write the report where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=["prose", "mixture", "paper", "corpus"])
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 128, 512], help=f"of {LENGTH} tokens")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--powers", type=int, nargs="+", default=[0, 1], help="of the affinity: 0 is GPTQ, 1 AGQ")
    parser.add_argument("--share", default="0/1", help="this process of so many: 0/2 and 1/2 divide the seeds")
    parser.add_argument("--quick", action="store_true", help="one seed, 8k tokens, 3 bits, AGQ: about a minute")
    parser.add_argument("--folder", type=Path, default=Path("runs/ebss_effect"), help="sampled sets and results")
    parser.add_argument("--json", type=Path, help="write all results here, and .md and .png beside it")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.windows, options.bits, options.powers = [0], [32], [3], [1]
    part, num_parts = map(int, options.share.split("/"))
    grid = product(options.windows, options.seeds, options.arms, options.bits, options.powers)
    cases = [Case(*values) for values in grid]
    options.folder.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(MODEL)
    for case in cases:
        # By seeds, so that no two processes write the same sampled set.
        if case.seed % num_parts == part and not case.path(options.folder).is_file():
            measure(yardstick, case, options.folder, max(options.windows))
    rows = [json.loads(case.path(options.folder).read_text()) for case in cases if case.path(options.folder).is_file()]
    write_report(rows, origin(__file__, args), options.json)


if __name__ == "__main__":
    main()
