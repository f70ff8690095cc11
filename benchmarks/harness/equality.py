r"""moeq against lm-evaluation-harness 0.4.13: the same rows, the same model, every document.

    OMP_NUM_THREADS=1 python -m benchmarks.harness.equality --data-dir DATA --num-documents 100 \
        --json benchmarks/results/equality.json

``DATA`` is laid out as docs/tasks.md says.  Rows are written out for both sides (``files.py``) and evaluated in float32
by both (``sides.py``); what is compared, and to what tolerance, is in ``compare.py``.  Models are folders;
``llama-like`` is a tiny random Llama with a tokenizer like Llama's, made here (``llama_like.py``).  Windows are the
models' own, as each side finds them out.  Nothing is downloaded; lm_eval has to be installed.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.harness.compare import Comparison, as_json, compare
from benchmarks.harness.files import write_files
from benchmarks.harness.models import open_model, origin, parser, prepare, write
from benchmarks.harness.report import report
from benchmarks.harness.routers import router_gap
from benchmarks.harness.sides import harness_model, run_harness, run_moeq
from moeq.tasks.encode import window_of

TASKS = (
    "winogrande", "copa", "openbookqa", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge", "mathqa", "sciq",
    "lambada_openai", "mmlu", "wikitext", "c4_sample",
)  # fmt: skip
MODELS = ("assets/reference-moe", "llama-like")


def main(args: Sequence[str] | None = None) -> None:
    """Compare, print and write tables; exits with 1 where something differs."""
    arguments = parser(__doc__, TASKS, MODELS)
    arguments.add_argument("--batch-size", type=int, default=16, help="rows per forward pass of the harness")
    options = arguments.parse_args(args)
    prepare(options)
    results: dict[str, dict[str, Comparison]] = {}
    for name in options.models:
        model, tokenizer = open_model(name, options.folder)
        for task in options.tasks:
            found = compare_task(model, tokenizer, task, options)
            results.setdefault(name, {})[task] = found
            print(
                f"{name}, {task}: {found.documents} documents, {len(found.ties)} ties, {found.relative:.1e}, "
                f"differences: {found.problems}", flush=True,
            )  # fmt: skip
    source = origin(__name__, options, args)
    plain = {model: {task: as_json(found) for task, found in tasks.items()} for model, tasks in results.items()}
    write(options, source, report(results, source), plain)
    if any(found.problems for tasks in results.values() for found in tasks.values()):
        sys.exit(1)


def compare_task(model: Any, tokenizer: Any, name: str, options: argparse.Namespace) -> Comparison:
    """One task on both sides."""
    files = write_files(name, options.data_dir, options.folder, options.num_documents)
    window = window_of(model.config, tokenizer)
    other_window = harness_model(model, tokenizer, options.batch_size).max_length
    assert window == other_window, f"the window is {window} tokens, in the harness {other_window}"
    ours = run_moeq(model, tokenizer, files, window, options.batch_tokens)
    theirs = run_harness(model, tokenizer, files, options.batch_size)
    return compare(files.task, ours, theirs, partial(router_gap, model))


if __name__ == "__main__":
    main()
