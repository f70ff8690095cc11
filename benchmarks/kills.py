"""Does a streamed fit that is killed at any moment end with the same bytes?  SIGKILL at random moments, then go on.

    python -m benchmarks.kills --times 20
    python -m benchmarks.kills --times 20 --json benchmarks/results/kills.json      # what the ledger shows
    python -m benchmarks.kills --quick                                              # three moments

A fit of the bundled model (3 bits, GPTQ, packed and dense export, verification) runs undisturbed once.  Then, in a new
folder for each number, it is killed at a moment that is uniform over the duration of the undisturbed run, and started
again by the same command until it ends; every second continued run is killed once more, at a moment of the same kind.
Where a run ends before its moment, another moment is drawn; where nothing is left to kill, the run starts over.

Compared are all files of blocks/, export/ and dense/, errors.csv, fallbacks.json and allocation.json, byte for byte.
Of JSON files of the exports the values named "seconds" are left out, and with them the size and the checksum of
config.json in the manifest.  Processes are forked from one that has imported everything, so that no kill is spent on
imports.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.provenance import command, provenance
from benchmarks.lab.tables import Row, markdown
from benchmarks.large.killed import differing_files, has_ended, run_killed
from moeq.disk.atomic import write_json, write_text

FIT = [
    "fit", "--config", "configs/gptq_text_w3.yaml", "--model.placement=stream", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--data.num_windows=16",
]  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Run, kill, continue and compare; ends with an error where bytes differ."""
    options = parser().parse_args(args)
    times = 3 if options.quick else options.times
    origin = f"`{command(__name__, args)}` at {provenance()}"
    with tempfile.TemporaryDirectory(prefix="kills_", dir=options.folder) as folder:
        rows = kill_and_compare(Path(folder), times, options.seed, options.fit)
    print(f"\n{report(rows)}")
    if options.json is not None:
        write_json(options.json, {"origin": origin, "rows": rows})
        text = f"# Runs that were killed and continued\n\n{origin}.\n\n{report(rows)}"
        write_text(options.json.with_suffix(".md"), text)
    if any(row["differing"] for row in rows):
        sys.exit("the bytes of some runs differ from those of the undisturbed run")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs that are killed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="a look: three runs")
    parser.add_argument("--folder", type=Path, help="where runs are written and removed again (default: of the system)")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option for every fit, as --fit=--model.x=1",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, and .md beside it")
    return parser


def kill_and_compare(folder: Path, times: int, seed: int, more: Sequence[str]) -> list[Row]:
    """One row for each killed run: moments, the phases that they met, and the files that differ in the end."""
    whole, killed = folder / "whole", folder / "killed"
    fit = [*FIT, *more, "--trainer.default_root_dir"]
    run_killed([*fit, str(whole)])  # once to warm the caches of the system, so that the second is what others take
    shutil.rmtree(whole)
    duration = run_killed([*fit, str(whole)]).seconds
    rows: list[Row] = []
    for number in range(times):
        rng = random.Random(seed * times + number)
        shutil.rmtree(killed, ignore_errors=True)
        met: list[tuple[float, str]] = []
        while len(met) < 1 + number % 2:
            moment = rng.uniform(0, duration)
            if has_ended(killed):  # before it could be killed often enough
                shutil.rmtree(killed)
                met.clear()
            if phase := run_killed([*fit, str(killed)], moment).phase:
                met.append((moment, phase))
        if not has_ended(killed):
            run_killed([*fit, str(killed)])
        rows.append({
            "number": number, "undisturbed_seconds": duration, "moments": [moment for moment, _ in met],
            "phases": [phase for _, phase in met], "differing": differing_files(whole, killed),
            "num_files": sum(path.is_file() for path in whole.rglob("*")),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def report(rows: Sequence[Row]) -> str:
    """How many runs ended with the same bytes, and a line for each of them."""
    lines = [
        [
            row["number"], ", ".join(f"{moment:.1f}" for moment in row["moments"]), ", then ".join(row["phases"]),
            ", ".join(row["differing"]) or "none",
        ]
        for row in rows
    ]  # fmt: skip
    same = sum(not row["differing"] for row in rows)
    kills = sum(len(row["phases"]) for row in rows)
    total = ["all", len(rows), kills, same, f"{rows[0]['undisturbed_seconds']:.1f}", rows[0]["num_files"]]
    head = ("", "runs", "kills", "runs that ended with the bytes of the undisturbed one", "its seconds", "its files")
    return f"{markdown(head, [total])}\n" + markdown(
        ("run", "killed after, s", "what was there then", "files that differ"), lines
    )


if __name__ == "__main__":
    main()
