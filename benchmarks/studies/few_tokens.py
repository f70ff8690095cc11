"""Few tokens, or the wrong ones: shrinkage, damping, and calibration of every expert on every token.

    OMP_NUM_THREADS=1 python benchmarks/few_tokens.py --output benchmarks/results/few_tokens.md

AGQ, group size 64.  ``kappa`` is how many effective samples of the block's pooled Hessian each expert's own gets;
``all experts`` makes the Hessians of all tokens (``--model.routing all_experts``), each with weight 1.  ``damping`` is
the share of the mean diagonal that is added to it (0.01 where an arm does not say; kappa is auto where it does not).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import LENGTH, calibration_set
from origin import origin
from trial import CachedGridGPTQ, Yardstick, fit

from callbacks.bit_allocation import BitAllocation
from callbacks.hessian_calibration import HessianCalibration

MODEL = "assets/reference-moe"
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


def main(args: Sequence[str] | None = None) -> None:
    """Measure every arm in every setting, print and write a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64], help=f"of {LENGTH} tokens")
    parser.add_argument("--sets", nargs="+", default=["prose", "corpus"], metavar="SET", help="of calibration_sets.py")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--quick", action="store_true", help="one seed, prose, 4k tokens, 3 bits")
    parser.add_argument("--folder", type=Path, default=Path("runs/few_tokens"), help="sampled sets and finished runs")
    parser.add_argument("--output", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write every run here")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.windows = options.seeds[:1], options.windows[:1]
        options.sets, options.bits = options.sets[:1], options.bits[:1]
    options.folder.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(MODEL)
    settings = list(itertools.product(options.sets, options.windows, options.bits))
    runs = []
    for seed, (name, num, bits), arm in itertools.product(options.seeds, settings, options.arms):
        runs.append(_run(yardstick, options.folder, arm, name, num, bits, seed))
        print(runs[-1], flush=True)
    lines = [f"| set | tokens | bits | {' | '.join(options.arms)} |", "|---" * (3 + len(options.arms)) + "|"]
    for name, num, bits in settings:
        cells = [_cell([r for r in runs if r["setting"] == [name, num, bits] and r["arm"] == a]) for a in options.arms]
        lines.append(f"| {name} | {num * LENGTH} | {bits} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(f"\n{table}")
    if options.output is not None:
        head = (
            f"# Few tokens, or the wrong ones\n\n{origin(__file__, args)}.  Mean KL over the domains (worst domain) in "
        )
        options.output.write_text(f"{head}thousandths of a nat, +- over seeds.\n\n{table}")
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")


def _run(yardstick: Yardstick, folder: Path, arm: str, name: str, num: int, bits: int, seed: int) -> dict[str, object]:
    """One quantization, read from its file where it is finished."""
    path = folder / f"{name}-{num}-{bits}bit-{arm.replace(', ', '-').replace(' ', '_')}-{seed}.json"
    if not path.exists():
        settings = dict(ARMS[arm])
        solver = CachedGridGPTQ(kappa=settings.pop("kappa", "auto"))
        ids_NL = calibration_set(yardstick, name, num, seed, folder)
        steps = [BitAllocation(), HessianCalibration(), solver]
        module = fit(ids_NL, steps, name=MODEL, bits=bits, group_size=64, **settings)
        kl = {domain: divergence.kl for domain, divergence in yardstick.measure(module.model).items()}
        path.write_text(json.dumps({"arm": arm, "setting": [name, num, bits], "seed": seed, "kl": kl}))
    run: dict[str, object] = json.loads(path.read_text())
    return run


def _cell(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    means = [1000 * fmean(run["kl"].values()) for run in runs]
    worst = fmean(1000 * max(run["kl"].values()) for run in runs)
    return f"{fmean(means):.1f}" + (f" +- {stdev(means):.1f}" if len(means) > 1 else "") + f" ({worst:.1f})"


if __name__ == "__main__":
    main()
