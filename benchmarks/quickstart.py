"""Quantize the bundled Mixture-of-Experts model in several ways and print one table.

``python benchmarks/quickstart.py``

Rows: the original, and at each bit width round-to-nearest (RTN), GPTQ calibrated on prose, and MoEQuant (EBSS
calibration data, AGQ); at the lowest width also MoEQuant with the deterministic search of the paper; at 3 bits with the
bits divided among the weights by the global allocator, 3 on average, and on top of that with routers refitted and
rounding learned.  Every row is a ``main.py fit`` followed by a ``main.py validate`` of its export, and can be repeated
with the command that is printed.
"""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from main import main as moeq
from moeq.report.results import ResultRow, markdown_table, read_results, write_results


@dataclass(frozen=True)
class Recipe:
    """One way to quantize: a label, a configuration and overrides."""

    label: str
    config: str
    overrides: tuple[str, ...] = ()


RTN = Recipe("RTN", "configs/rtn_w3.yaml")
GPTQ_PROSE = Recipe("GPTQ (prose)", "configs/gptq_text_w3.yaml")
MOEQUANT = Recipe("MoEQuant", "configs/moequant_w3.yaml")
MOEQUANT_PAPER = Recipe("MoEQuant (paper EBSS)", "configs/moequant_w3.yaml", ("--data.mode", "paper"))
ALLOCATED = Recipe("MoEQuant, allocated", "configs/moequant_allocated_w3.yaml")
BEST = Recipe("MoEQuant, all steps", "configs/moequant_best_w3.yaml")


def run(command: Sequence[str]) -> None:
    """Print a command and run it in this process."""
    print(f"\n$ python main.py {shlex.join(command)}", flush=True)
    moeq(list(command))


def fit_and_validate(recipe: Recipe, bits: int, folder: Path, overrides: Sequence[str]) -> ResultRow:
    """Quantize and evaluate; a folder of an earlier quickstart is replaced."""
    row_folder = folder / f"{Path(recipe.config).stem}_{bits}bit{'_paper' if recipe is MOEQUANT_PAPER else ''}"
    shutil.rmtree(row_folder, ignore_errors=True)
    cache = ["--data.cache_dir", str(folder / "calibration")] if "moequant" in recipe.config else []
    common = ["--trainer.default_root_dir", str(row_folder), "--model.label", recipe.label]
    run(["fit", "--config", recipe.config, "--model.bits", str(bits), *common, *recipe.overrides, *cache, *overrides])
    return validate(str(row_folder / "export"), recipe.label, row_folder)


def validate(model: str, label: str, folder: Path) -> ResultRow:
    """Evaluate one model; returns its row."""
    options = ["--model.name", model, "--model.label", label, "--trainer.default_root_dir", str(folder)]
    run(["validate", "--config", "configs/eval.yaml", *options])
    return read_results(folder / "results.json")[0]


def main(args: Sequence[str] | None = None) -> None:
    """Run every row and write results.json and results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], help="bit widths")
    parser.add_argument("--fit", nargs="*", default=[], metavar="OPTION", help="options for every fit, as --data.x=1")
    options = parser.parse_args(args)
    start = time.perf_counter()
    rows = [validate("assets/reference-moe", "original", options.folder / "original")]
    for bits in options.bits:
        recipes = [RTN, GPTQ_PROSE, *([MOEQUANT_PAPER] if bits == min(options.bits) else []), MOEQUANT]
        # Their configurations state their own budget.
        recipes += [ALLOCATED, BEST] if bits == 3 else []
        rows += [fit_and_validate(recipe, bits, options.folder, options.fit) for recipe in recipes]
        write_results(rows, options.folder)
    print(
        f"\n{markdown_table(rows)}\nWritten to {options.folder / 'results.json'} in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
