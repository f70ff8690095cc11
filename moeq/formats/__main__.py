"""Write a finished packed export in a runtime's format, without quantizing again.

python -m moeq.formats --to gguf runs/moequant_w4/export            -> runs/moequant_w4/gguf
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moeq.quant.carrier import FORMATS


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(args)
    from tqdm import tqdm

    from moeq.export.compare import ExportMismatchError
    from moeq.formats.convert import convert, find_format, proof

    output = options.output or options.export.absolute().parent / options.to
    try:
        report = convert(
            options.export, options.to, output, carrier=options.carrier, overwrite=options.overwrite,
            progress=lambda items, label: tqdm(items, desc=f"{options.to}, {label}", disable=options.quiet),
        )  # fmt: skip
    except (ValueError, ExportMismatchError, OSError) as error:
        sys.stderr.write(f"moeq: {error}\n")
        return 1
    sys.stdout.write(
        f"{report.path}: {report.num_bytes / 1e6:.2f} MB, {report.bits_per_weight:.3f} bits per quantized weight; "
        f"{proof(report)}\n{find_format(options.to).serve(output)}\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moeq.formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="folder of the packed export (export/ of a run)")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument("--output", type=Path, help="folder to create (default: the format's name, beside the export)")
    parser.add_argument(
        "--carrier", choices=("exact", "native"), default="exact",
        help="exact: every value as it was evaluated, in the smallest type that holds it; native: the type of the "
        "grid's own width, whose offsets may round (default: exact)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
