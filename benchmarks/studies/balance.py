"""Where expert balance matters: plain self-sampling against EBSS by set size, on the worst domain and the worst expert.

    OMP_NUM_THREADS=1 python benchmarks/ebss_balance.py --output benchmarks/results/ebss_balance.md

3 bits, AGQ.  ``plain`` is sampling without any balance, ``stochastic`` the balanced choice among the branches of a
sequence, ``corpus`` the set that is steered as a whole, ``corpus without balance`` its search without steering.
Expert errors are relative output errors of single experts on evaluation text.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration_sets import LENGTH, SAMPLED, sampled_set
from origin import origin
from trial import Yardstick, fit

ARMS = {
    "plain": SAMPLED["plain"],
    "stochastic": SAMPLED["stochastic"],
    "corpus": SAMPLED["corpus"],
    "corpus without balance": replace(SAMPLED["corpus"], balance=False),
}
COLUMNS = ("mean KL", "worst-domain KL", "mean expert error", "worst expert error", "least effective samples")


def main(args: Sequence[str] | None = None) -> None:
    """Print one Markdown row per arm and size; write the table where an output is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/reference-moe", help="folder of a model with the same tokenizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 32], help=f"of {LENGTH} tokens")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=str(list(ARMS))
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 2k tokens")
    parser.add_argument("--folder", type=Path, default=Path("runs/ebss_balance"), help="sampled sets")
    parser.add_argument("--output", type=Path, help="write the table here")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.quick:
        options.seeds, options.windows = options.seeds[:1], options.windows[:1]
    options.folder.mkdir(parents=True, exist_ok=True)
    yardstick = Yardstick(options.model)
    lines = [f"| tokens | set | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for num_windows in options.windows:
        for arm in options.arms:
            rows = [_measure(yardstick, options, arm, num_windows, seed) for seed in options.seeds]
            cells = [_cell([row[i] for row in rows]) for i in range(len(COLUMNS))]
            lines.append(f"| {num_windows * LENGTH} | {arm} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    print(f"\n{table}")
    if options.output is not None:
        head = f"# Where expert balance matters\n\n{origin(__file__, args)}; +- over seeds.\n\n"
        options.output.write_text(head + table)


def _measure(yardstick: Yardstick, options: argparse.Namespace, arm: str, num_windows: int, seed: int) -> list[float]:
    from moeq.sampling.effective import measure_evidence

    ids_NL = sampled_set(yardstick, ARMS[arm], arm, seed, options.folder, num_windows, max(options.windows))
    module = fit(ids_NL, name=options.model, bits=3, group_size=64, affinity_power=1.0)
    kl = [divergence.kl for divergence in yardstick.measure(module.model).values()]
    errors = yardstick.expert_errors(module.model)
    least = float(measure_evidence(yardstick.model, ids_NL).effective_LE().min())
    return [fmean(kl), max(kl), float(errors.mean()), float(errors.max()), least]


def _cell(values: Sequence[float]) -> str:
    return f"{fmean(values):.3g}" + (f" +- {stdev(values):.2g}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
