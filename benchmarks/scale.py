"""Does the memory of a fit depend on the number of blocks?  Models with the shapes of Qwen3-30B-A3B under a hard limit.

    python -m benchmarks.scale make --blocks 16 runs/scale/model               # 1.25 GB, and as much for each block
    python -m benchmarks.scale run --blocks 4 8 16                             # fits each under 8 GiB (ulimit -v)
    python -m benchmarks.scale run --blocks 2 3 --quick                        # small shapes, same code, seconds
    python -m benchmarks.scale run --json benchmarks/results/scale.json        # what the ledger shows
    python -m benchmarks.scale report a.json b.json --json FILE                # one report of what several calls found
    python -m benchmarks.scale run --blocks 48 --fit=--model.clip_search=true  # more options of main.py fit

`make` writes random weights of realistic scale, the same for the same seed, with the tokenizer of the bundled model.
`run` makes what it needs in --folder, fits at 4 bits (benchmarks/large/fit_w4.yaml: GPTQ, packed export, verification;
no clip search, which doubles the time and takes no memory), and states the peak of resident memory, what a block takes
in each phase, and the floor: its bytes at the measured rate of the disk, its products at the rate of the processor.
The limit is on the address space of the process, which is more than what is resident.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.lab.provenance import command, provenance
from benchmarks.lab.tables import Row
from benchmarks.large.checkpoint import QUICK, QWEN3_30B_A3B, Shape, link_checkpoint, shards, write_checkpoint
from benchmarks.large.floor import Rates, product_rate, reading_rate
from benchmarks.large.limited import GIB, run_limited
from benchmarks.large.report import Scale, read_run, read_scales, scale_report
from moeq.disk.atomic import write_json, write_tensors, write_text

TOKENIZER, IDS = "assets/reference-moe", "ids.safetensors"
CONFIG = "benchmarks/large/fit_w4.yaml"
# Of the calibration set.
NUM_SEQUENCES, LENGTH = 8, 512


def main(args: Sequence[str] | None = None) -> None:
    """Make a checkpoint, or run every number of blocks and print the tables."""
    options = parser().parse_args(args)
    if options.command == "report":
        origin, scale = read_scales(options.files)
        write(options.json, scale, origin)
        print(scale_report(scale))
        return
    shape = QUICK if options.quick else QWEN3_30B_A3B
    if options.command == "make":
        write_checkpoint(options.folder, shape, options.blocks, options.seed, TOKENIZER)
        print(f"{options.folder}: {options.blocks} blocks of {shape.block_numbers() / 1e6:.0f} M parameters")
        return
    write_checkpoint(options.folder / "model", shape, max(options.blocks), options.seed, TOKENIZER)
    write_ids(options.folder / IDS, options.seed)
    scale = Scale(shape, NUM_SEQUENCES * LENGTH, LENGTH, measured_rates(shape, options.folder / "model"), [])
    origin = f"`{command(__name__, args)}` at {provenance()}"
    for num_blocks in options.blocks:
        scale.rows.append(fit(shape, num_blocks, options))
        print(f"{num_blocks} blocks: {scale.rows[-1]['seconds']:.0f} s, exit code {scale.rows[-1]['code']}", flush=True)
        write(options.json, scale, origin)
    print(f"\n{scale_report(scale)}")
    if failed := [row for row in scale.rows if row["code"]]:
        sys.exit(f"{len(failed)} of {len(scale.rows)} runs failed; their logs are in {options.folder}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a checkpoint")
    make.add_argument("folder", type=Path, help="where; files that are there already are kept")
    make.add_argument("--blocks", type=int, default=16, help="number of blocks (default 16; the model has 48)")
    run = commands.add_parser("run", help="fit models of several numbers of blocks under a limit of memory")
    run.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16], help="numbers of blocks (default 4 8 16)")
    run.add_argument("--limit-gib", type=float, default=8.0, help="of the address space (default 8); 0 is no limit")
    run.add_argument("--folder", type=Path, default=Path("runs/scale"), help="models and runs (default runs/scale)")
    run.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option for every fit, as --fit=--model.x=1",
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, and .md beside it")
    report = commands.add_parser("report", help="one report of several results")
    report.add_argument("files", type=Path, nargs="+", help="what --json of several calls wrote")
    report.add_argument("--json", type=Path, metavar="FILE", help="write all rows here, and .md beside it")
    for each in (make, run):
        each.add_argument("--seed", type=int, default=0, help="of the weights")
        each.add_argument("--quick", action="store_true", help="small shapes: hidden 256, 16 experts of width 128")
    return parser


def write_ids(path: Path, seed: int) -> None:
    """Any tokens of the tokenizer, as a file of sequences that were written elsewhere."""
    num_tokens = len(AutoTokenizer.from_pretrained(TOKENIZER))
    generator = torch.Generator().manual_seed(seed)
    write_tensors(path, {"input_ids": torch.randint(num_tokens, (NUM_SEQUENCES, LENGTH), generator=generator)})


def measured_rates(shape: Shape, model: Path) -> Rates:
    """Of this machine: the disk on the files of a block, products in the shapes of an expert."""
    return Rates(
        read=reading_rate(model / "block_000.safetensors"),
        model_products=product_rate(torch.bfloat16, 256, shape.hidden_size, 2 * shape.moe_intermediate_size),
        float32_products=product_rate(torch.float32, shape.hidden_size, shape.hidden_size, shape.hidden_size),
    )


def fit(shape: Shape, num_blocks: int, options: argparse.Namespace) -> Row:
    """Fit the first blocks of the model, in a process of its own under the limit; its folder is removed in the end."""
    model, run = options.folder / f"model_{num_blocks}", options.folder / f"fit_{num_blocks}"
    link_checkpoint(options.folder / "model", model, shape, num_blocks, TOKENIZER)
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["--config", CONFIG, f"--model.name={model}", f"--data.path={options.folder / IDS}", *options.fit]
    limit = int(options.limit_gib * GIB) or None
    log = run.with_suffix(".log")
    finished = run_limited(
        [sys.executable, "main.py", "fit", *arguments, f"--trainer.default_root_dir={run}"], limit, log
    )
    row: Row = {
        "blocks": num_blocks, "limit_bytes": limit, "code": finished.code, "seconds": finished.seconds,
        "processor_seconds": finished.processor_seconds,
        "model_bytes": sum((model / name).stat().st_size for name, _ in shards(shape, num_blocks)),
        "block_bytes": (model / "block_000.safetensors").stat().st_size,
        "resident_bytes": finished.peak.resident, "anonymous_bytes": finished.peak.anonymous,
        "address_space_bytes": finished.peak.address_space,
    }  # fmt: skip
    if finished.code:
        return {**row, "error": log.read_text(encoding="utf8").strip().rpartition("\n")[2]}
    row |= read_run(run)
    shutil.rmtree(run)
    return row


def write(path: Path | None, scale: Scale, origin: str) -> None:
    """With a path: rows as JSON, and beside it the report."""
    if path is not None:
        write_json(path, {"origin": origin, **scale.as_json()})
        text = f"# Memory and time by number of blocks\n\n{origin}.\n\n{scale_report(scale)}"
        write_text(path.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
