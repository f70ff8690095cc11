"""Do two ranks give the codes of one?  Fits the bundled model on one and on two ranks (CPU, gloo) and counts.

``python benchmarks/ranks.py --json benchmarks/results/ranks.json``
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moeq.export.moeq_format import read_quantized

CONFIG = "configs/moequant_w3.yaml"
TWO = ["--trainer.devices=2", "--trainer.strategy=moeq_ddp"]


def fit(folder: Path, options: Sequence[str]) -> float:
    """Run one fit in processes of its own; returns its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "main.py", "fit", "--config", CONFIG, "--trainer.accelerator=cpu", *options]
    print("$", shlex.join(command), flush=True)
    start = time.perf_counter()
    # One thread per rank, so that one rank has half of the cores and the times can be compared.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"--trainer.default_root_dir={folder}"], check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def compare(one: Path, two: Path) -> dict[str, int]:
    """Codes, and scales and zero points, that differ between two exports."""
    weights, others = read_quantized(one), read_quantized(two)
    assert weights.keys() == others.keys()
    pairs = [(weights[name], others[name]) for name in weights]
    return {
        "codes": sum(a.codes_OI.numel() for a, _ in pairs),
        "codes_different": sum(int((a.codes_OI != b.codes_OI).sum()) for a, b in pairs),
        "weights_different": sum(int((a.codes_OI != b.codes_OI).any()) for a, b in pairs),
        "scales_different": sum(int((a.scale_OG != b.scale_OG).sum()) for a, b in pairs),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Fit twice, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 sequences of 64 tokens: about a minute")
    parser.add_argument("--folder", type=Path, default=Path("runs/ranks"), help="scratch folder")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(args)
    # Corpus mode writes other sequences with other numbers of ranks, which the comparison is not about.
    data = ["--data.mode=stochastic"]
    data += ["--data.num_sequences=8", "--data.length=64", "--data.batch_size=2"] if options.quick else []
    cache = [f"--data.cache_dir={options.folder / 'calibration'}"]
    one, two = options.folder / "one", options.folder / "two"
    fit(one, [*data, *cache])  # samples; timed again below, with the sequences at hand
    seconds = {"seconds_one_rank": fit(one, [*data, *cache]), "seconds_two_ranks": fit(two, [*data, *cache, *TWO])}
    result = {**compare(one / "export", two / "export"), **seconds}
    result["share_different"] = result["codes_different"] / result["codes"]
    print(json.dumps(result, indent=1))
    if options.json is not None:
        hardware = f"{platform.machine()}, {os.cpu_count()} cores, CPU, one thread per rank"
        command = "python benchmarks/ranks.py " + " ".join(sys.argv[1:] if args is None else args)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"command": command, "hardware": hardware, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
