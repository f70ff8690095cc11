"""What EBSS and AGQ are worth: KL to the original for every combination, over several calibration seeds.

Arms (3 bits, group 64, equal token counts): RTN; GPTQ and AGQ on prose; GPTQ and AGQ on text that the model samples
without the balance term; GPTQ and AGQ on stochastic EBSS; AGQ on EBSS of the corpus (MoEQuant) and of the paper.
``python benchmarks/calibration_study.py --seeds 0 1 2 --json benchmarks/results/calibration.json``
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from main import main as moeq
from moeq.report.results import read_results

EBSS, PROSE = "configs/moequant_w3.yaml", "configs/gptq_text_w3.yaml"
DRAWN, PAPER = "--data.mode=stochastic", "--data.mode=paper"
UNBALANCED = (DRAWN, "--data.balance=false")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "RTN": ("configs/rtn_w3.yaml", ()),
    "GPTQ, prose": (PROSE, ("--model.affinity_power=0",)),
    "AGQ, prose": (PROSE, ("--model.affinity_power=1",)),
    "GPTQ, self-sampled": (EBSS, (*UNBALANCED, "--model.affinity_power=0")),
    "AGQ, self-sampled": (EBSS, (*UNBALANCED, "--model.affinity_power=1")),
    "GPTQ, EBSS": (EBSS, (DRAWN, "--model.affinity_power=0")),
    "AGQ, EBSS": (EBSS, (DRAWN, "--model.affinity_power=1")),
    "MoEQuant (AGQ, EBSS of the corpus)": (EBSS, ("--model.affinity_power=1",)),
    "MoEQuant, paper EBSS": (EBSS, (PAPER, "--model.affinity_power=1")),
}
EVALUATE = ["--data.tasks=[]", "--trainer.enable_progress_bar=false"]


def measure(arm: str, seed: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Fit one arm with one seed and evaluate its export."""
    config, overrides = ARMS[arm]
    shutil.rmtree(folder / "run", ignore_errors=True)
    run = ["--trainer.default_root_dir", str(folder / "run"), "--trainer.enable_progress_bar=false"]
    seeded = [] if arm == "RTN" else [f"--data.seed={seed}", *options]
    cache = ["--data.cache_dir", str(folder / "calibration")] if config == EBSS else []
    moeq(["fit", "--config", config, "--model.label", arm, *run, *seeded, *overrides, *cache])
    moeq(["validate", "--config", "configs/eval.yaml", "--model.name", str(folder / "run/export"), *run[:2], *EVALUATE])
    (row,) = read_results(folder / "run/results.json")
    return {
        "arm": arm, "seed": seed, "kl_mean": row.kl_mean, "kl_worst": row.kl_worst, "perplexity": row.perplexity,
        "top1_agreement": row.top1_agreement, "router_agreement": row.router_agreement,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds of each arm."""
    lines = ["| arm | seeds | KL mean | KL worst domain | top-1 % | router % |", "|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        group = [row for row in rows if row["arm"] == arm]

        def cell(key: str, scale: float, digits: int, group: list[dict[str, Any]] = group) -> str:
            values = [scale * row[key] for row in group]
            spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{fmean(values):.{digits}f}{spread}"

        cells = [cell("kl_mean", 1, 5), cell("kl_worst", 1, 5), cell("top1_agreement", 100, 2)]
        lines.append(f"| {arm} | {len(group)} | {' | '.join([*cells, cell('router_agreement', 100, 2)])} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the arms, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration seeds")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument(
        "--fit", nargs="*", default=[], metavar="OPTION", help="options of every fit, as --model.bits=4"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, two arms: about a minute")
    parser.add_argument("--json", type=Path, help="write rows here, and the table beside it as .md")
    parser.add_argument("--folder", type=Path, default=Path("runs/calibration_study"), help="scratch folder")
    options = parser.parse_args(args)
    seeds, arms = (options.seeds[:1], ["RTN", "GPTQ, prose"]) if options.quick else (options.seeds, options.arms)
    rows = []
    for arm in arms:
        for seed in [0] if arm == "RTN" else seeds:
            rows.append(measure(arm, seed, options.folder, options.fit))
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{table(rows)}")
    if options.json is not None:
        write(options.json, rows, args)


def write(path: Path, rows: list[dict[str, Any]], args: Sequence[str] | None) -> None:
    """Results as JSON and Markdown, with what produced them."""
    command = "python benchmarks/calibration_study.py " + " ".join(sys.argv[1:] if args is None else args)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    origin = {
        "command": command,
        "commit": commit.strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        f"# Calibration study\n\n`{command}` at {origin['commit']} on {origin['hardware']}; means over four domains, "
        f"32 windows of 256 tokens each; +- is the standard deviation over seeds.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
