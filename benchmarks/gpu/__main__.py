"""What moeq does on a GPU, in order of value, within eight minutes.

    python -m benchmarks.gpu                               # all steps but `tiles`; writes runs/gpu/gpu.json and .md
    python -m benchmarks.gpu --quick --device cpu          # a rehearsal of all of it without a GPU, in seconds
    python -m benchmarks.gpu --steps products tiles
    python -m benchmarks.gpu --json benchmarks/results/gpu.json

Every row is written as soon as it is known. The exit code is 1 where a path of the device is not right.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

STARTED, HOUR = time.perf_counter(), 3600.0


def main(args: Sequence[str] | None = None) -> None:
    """Run the steps."""
    from benchmarks.gpu.block import blocks
    from benchmarks.gpu.models import fits, packed_models, sequences, validations
    from benchmarks.gpu.numbers import numbers
    from benchmarks.gpu.products import products
    from benchmarks.gpu.solves import solves
    from benchmarks.gpu.steps import Setting, Step, run_steps
    from benchmarks.gpu.tiles import tiles
    from benchmarks.lab.provenance import command, provenance

    steps = [
        Step("numbers", 60, numbers), Step("fit", 70, fits), Step("packed models", 40, packed_models),
        Step("validate", 50, validations), Step("solve", 70, solves), Step("block", 120, blocks),
        Step("products", 60, products), Step("EBSS", 40, sequences),
    ]  # fmt: skip
    extra = [Step("tiles", 240, tiles)]
    names = {step.name.replace(" ", "_"): step for step in (*steps, *extra)}
    options = parser(list(names)).parse_args(args)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here; --quick --device cpu rehearses the same steps")
    chosen = [names[name] for name in options.steps] if options.steps else steps + extra * options.quick
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    setting = Setting(torch.device(options.device), options.quick, options.folder)
    origin = f"`{command(__name__, args)}` at {provenance(setting.device)}"
    path = options.json or options.folder / "gpu.json"
    if options.quick:  # other work on the machine does not cut a rehearsal short
        chosen = [replace(step, seconds=HOUR) for step in chosen]
    total = options.seconds or (HOUR if options.quick else 460.0)
    rows = run_steps(chosen, setting, total, path, origin, STARTED if args is None else time.perf_counter())
    wrong = [f"{row['step']}: {row['what']}" for row in rows if row.get("right") is False]
    if wrong:
        sys.exit(f"not right: {'; '.join(wrong)}")


def parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is judged (default cuda)")
    made.add_argument("--quick", action="store_true", help="small shapes and few repeats, and `tiles` too")
    made.add_argument("--steps", nargs="+", choices=names, help="these alone, in this order")
    made.add_argument("--seconds", type=float, help="of the whole process (default 460; with --quick an hour)")
    made.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="models and runs; emptied (runs/gpu)")
    made.add_argument("--json", type=Path, metavar="FILE", help="rows, and .md beside it (default in the folder)")
    return made


if __name__ == "__main__":
    main()
