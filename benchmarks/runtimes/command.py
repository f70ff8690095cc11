"""Does each runtime compute with an export what transformers computes with its values?  Right, refused, or wrong.

    python -m benchmarks.runtimes --environments runs/runtimes/env
    python -m benchmarks.runtimes --json benchmarks/results/runtimes.json           # what the ledger shows
    python -m benchmarks.runtimes --quick                                           # two families, what is installed

The bundled model and tiny random models of every family that a format knows are rounded to nearest on uniform and mixed
grids, exported in every format, and opened by llama.cpp, mlx-lm, transformers, vLLM and GPTQModel on the CPU.  Log-
probabilities of the next token, from token ids, are compared with those of transformers in float32 on the dequantized
weights.  benchmarks/runtimes/README.md makes the environments of vLLM and GPTQModel; without them they are left out.

Rows of a model and a runtime are kept in --folder as they come: a run that was stopped goes on, one that has further
grids measures those, and one that comes after a change of one format needs only the files of its runtime removed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from benchmarks.lab.provenance import command, provenance
from benchmarks.lab.tables import Row
from benchmarks.runtimes.cells import REFERENCE
from benchmarks.runtimes.exports import reference_source, tiny_source
from benchmarks.runtimes.measure import Measurement
from benchmarks.runtimes.report import TITLE, report
from benchmarks.runtimes.runtime import Runtime, runtimes
from moeq.disk.atomic import write_json, write_text
from moeq.formats.gguf_families import FAMILIES as GGUF_FAMILIES
from moeq.formats.gguf_wrappers import WRAPPERS as GGUF_WRAPPERS
from moeq.formats.mlx_known import KNOWN as MLX_FAMILIES

# Further families whose files hold experts one by one, which compressed-tensors and GPTQ's layout are for.
_APART = ("flex_olmo", "phimoe", "qwen3_5_moe_text")
_QUICK = ("mixtral", "qwen3_moe")


def main(args: Sequence[str] | None = None) -> None:
    """Measure what is missing; ends with an error where a runtime opened an export and computed something else."""
    options = parser().parse_args(args)
    os.environ.setdefault("TQDM_DISABLE", "1")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    chosen = [
        each for each in runtimes(options.environments) if options.runtimes is None or each.name in options.runtimes
    ]
    rows: list[Row] = []
    for model in models(options):
        rows += measure(model, chosen, options)
    versions = [each.version() for each in chosen if each.missing() is None]
    origin = f"`{command('benchmarks.runtimes', args)}` at {provenance()}; seed {options.seed}; {', '.join(versions)}"
    text = report(rows)
    print(f"\n{text}")
    if options.json is not None:
        write_json(options.json, {"origin": origin, "rows": rows})
        write_text(options.json.with_suffix(".md"), f"# {TITLE}\n\n{origin}.\n\n{text}")
    if wrong := [row for row in rows if row["verdict"] == "wrong"]:
        sys.exit(f"{len(wrong)} exports were opened and computed otherwise")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="reference, or families (default: all)")
    parser.add_argument("--runtimes", nargs="+", metavar="NAME", help="as the report calls them (default: all)")
    parser.add_argument("--grids", nargs="+", metavar="KEY", help="as the report calls them (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of random models and their ids")
    parser.add_argument("--windows", type=int, default=4, help="of 256 tokens for the bundled model (default 4)")
    parser.add_argument("--quick", action="store_true", help=f"a look: {', '.join(_QUICK)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/runtimes"), help="rows that are kept")
    parser.add_argument("--environments", type=Path, default=Path("runs/runtimes/env"), help="of vLLM and GPTQModel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, and .md beside it")
    return parser


def models(options: argparse.Namespace) -> list[str]:
    """Names of the models that the options ask for."""
    if options.models is not None:
        return list(options.models)
    if options.quick:
        return list(_QUICK)
    return [REFERENCE, *dict.fromkeys([*GGUF_FAMILIES, *MLX_FAMILIES, *_APART, *GGUF_WRAPPERS])]


def measure(model: str, chosen: Sequence[Runtime], options: argparse.Namespace) -> list[Row]:
    """Rows of a model; those that were kept are not measured again."""
    paths = {each.name: options.folder / f"{model}_{each.name}_{options.seed}.json" for each in chosen}
    kept: dict[str, list[Row]] = {
        name: json.loads(path.read_text(encoding="utf8")) if path.exists() else [] for name, path in paths.items()
    }
    known = [row for rows in kept.values() for row in rows]
    with TemporaryDirectory(prefix="runtimes_") as folder:
        path = Path(folder)
        source = reference_source(options.windows) if model == REFERENCE else tiny_source(
            model, path / "source", options.seed
        )  # fmt: skip
        measured = Measurement(source, path, options.grids).rows(chosen, known)
    options.folder.mkdir(parents=True, exist_ok=True)
    for each in chosen:
        rows = [row for row in measured if row["runtime"] == each.name]
        if rows:
            print(model, each.name, [row["verdict"] for row in rows], flush=True)
        if rows and each.missing() is None:
            kept[each.name] += rows
            write_json(paths[each.name], kept[each.name])
    return [row for rows in kept.values() for row in rows] + [row for row in measured if row["verdict"] == "absent"]
