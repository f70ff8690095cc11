"""Quantize the bundled Mixture-of-Experts model in several ways and print one table.

    python -m benchmarks.quickstart
    python -m benchmarks.quickstart --all --json benchmarks/results/quickstart.json    # what README shows

Rows: the original, and at each bit width round-to-nearest (RTN) and MoEQuant (EBSS calibration data, AGQ); at the
lowest width also GPTQ calibrated on prose; at 3 bits with the bits divided among the weights by the global allocator, 3
on average.  With ``--all`` also every step that moeq has, on top of that (longer than all other rows together), EBSS as
in the paper, and GPTQ on prose at every width.  Every row is a ``main.py fit`` followed by a ``main.py validate`` of
its export, and can be repeated with the command that is printed.
"""

import argparse
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.lab.provenance import command, provenance
from main import main as moeq
from moeq.disk.atomic import write_json
from moeq.report.results import ResultRow, markdown_table, read_results, write_results


@dataclass(frozen=True)
class Recipe:
    """One way to quantize: a label, a configuration and overrides."""

    label: str
    config: str
    overrides: tuple[str, ...] = ()


LEGEND = """\
One seed: a demonstration, not a study. KL is the mean divergence of the next-token distribution from the original's, in
nats, over four domains (WikiText-2, Python, GSM8K, arithmetic; 32 windows of 256 tokens each, as for perplexities);
router agreement is the share of (token, block) pairs that go to the same experts as before; seconds are of the fit."""
RTN = Recipe("RTN", "configs/rtn_w3.yaml")
GPTQ_PROSE = Recipe("GPTQ (prose)", "configs/gptq_text_w3.yaml")
MOEQUANT = Recipe("MoEQuant", "configs/moequant_w3.yaml")
MOEQUANT_PAPER = Recipe("MoEQuant (paper EBSS)", "configs/moequant_w3.yaml", ("--data.mode", "paper"))
ALLOCATED = Recipe("MoEQuant, allocated", "configs/moequant_allocated_w3.yaml")
BEST = Recipe("MoEQuant, all steps", "configs/moequant_best_w3.yaml")


def recipes(bits: int, *, lowest: bool, everything: bool) -> list[Recipe]:
    """Rows of one width, in order; ``lowest``: of those asked for."""
    found = [RTN, *([GPTQ_PROSE] if lowest or everything else []), MOEQUANT]
    found += [MOEQUANT_PAPER] if lowest and everything else []
    # Their configurations state their own budget.
    found += [ALLOCATED, *([BEST] if everything else [])] if bits == 3 else []
    return found


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


def write(path: Path, rows: Sequence[ResultRow], origin: str) -> None:
    """Rows as JSON, and the table beside it."""
    write_json(path, {"origin": origin, "rows": [asdict(row) for row in rows]})
    text = f"# Quickstart\n\n{origin}.\n\n{LEGEND}\n\n{markdown_table(rows)}"
    path.with_suffix(".md").write_text(text, encoding="utf8")


def main(args: Sequence[str] | None = None) -> None:
    """Run every row and write results.json and results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4], help="bit widths")
    parser.add_argument("--fit", nargs="*", default=[], metavar="OPTION", help="options for every fit, as --data.x=1")
    parser.add_argument(
        "--all", action="store_true", help="also all steps, EBSS as in the paper, and GPTQ on prose at every width"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well, and .md beside it")
    options = parser.parse_args(args)
    start = time.perf_counter()
    rows = [validate("assets/reference-moe", "original", options.folder / "original")]
    for bits in options.bits:
        chosen = recipes(bits, lowest=bits == min(options.bits), everything=options.all)
        rows += [fit_and_validate(recipe, bits, options.folder, options.fit) for recipe in chosen]
        write_results(rows, options.folder)
    minutes = (time.perf_counter() - start) / 60
    if options.json is not None:
        device = json.loads((options.folder / "original" / "results.json").read_text())["device"]
        origin = f"`{command(__name__, args)}` at {provenance(device)}, {minutes:.1f} minutes"
        write(options.json, rows, origin)
    print(f"\n{markdown_table(rows)}\nWritten to {options.folder / 'results.json'} in {60 * minutes:.0f} s")
    if not options.all:
        print("--all adds the row of all steps (about ten minutes of two cores) and those of other samplers.")


if __name__ == "__main__":
    main()
