"""Measure how long this machine takes for products with a model's weights on each grid, for an allocator.

python -m moeq.timing --model assets/reference-moe                   -> times.json
    BitAllocation: {method: allocate, cost: fisher, budget: 5, budget_unit: milliseconds, times: times.json}

Products are those of packed exports opened with experts_implementation="moeq_packed" on a CPU.  The model gives shapes
alone: its configuration is enough.  OMP_NUM_THREADS, or --threads, should be what the result is served with.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(args)
    import torch
    from tqdm import tqdm

    from moeq.allocation.plan import parse_choices
    from moeq.disk.atomic import write_json
    from moeq.quant.spec import choose_grid
    from moeq.timing.measure import measure_times
    from moeq.timing.shapes import model_shapes
    from moeq.timing.summary import summary

    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        choices = parse_choices(options.choices, options.group_size or None)
        like = choose_grid(options.grid, 4, 64, symmetric=options.symmetric, clip_search=False)
        weights = model_shapes(options.model)
        table = measure_times(
            weights, choices, like, dtype=getattr(torch, options.dtype), rows=sorted({1, *options.rows}),
            room=options.room, turns=options.turns, progress=lambda shapes: tqdm(shapes, disable=options.quiet),
        )  # fmt: skip
        write_json(options.output, table.to_json())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"moeq: {error}\n")
        return 1
    sys.stdout.write(f"{summary(table, weights)}\n{options.output}: {table.machine}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeq.timing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the model")
    parser.add_argument(
        "--choices", nargs="+", default=["2", "3", "4", "8"],
        help="what an allocator may give: bits, or labels such as 4g128 and q4_k (default: 2 3 4 8)",
    )  # fmt: skip
    parser.add_argument("--group-size", type=int, default=64, help="of choices that are bits; 0: none (default: 64)")
    parser.add_argument("--grid", choices=("uniform", "full_range"), default="uniform", help="as --model.grid of a fit")
    parser.add_argument("--symmetric", action="store_true", help="as --model.symmetric of a fit")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="in which it is served (default: bfloat16)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="tokens at once; budgets are about 1")
    parser.add_argument("--room", action="store_true", help="weights may take more memory than their files")
    parser.add_argument("--threads", type=int, help="of torch (default: as it is set)")
    parser.add_argument("--turns", type=int, default=5, help="repetitions, the least of which counts (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("times.json"), help="file to write (default: times.json)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
