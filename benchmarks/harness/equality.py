"""moeq against lm-evaluation-harness 0.4.13: the same rows, the same model, every document; and how fast each is.

    OMP_NUM_THREADS=1 python benchmarks/harness.py --data-dir DATA --num-documents 100 \
        --output benchmarks/results/harness.md --json benchmarks/results/harness.json
    OMP_NUM_THREADS=1 python benchmarks/harness.py --data-dir DATA --speed --tasks hellaswag mmlu --num-documents 600

``DATA`` is laid out as docs/tasks.md says.  Rows are written out for both sides (``harness_files.py``) and evaluated in
float32 by both (``harness_sides.py``); what is compared, and to what tolerance, is in ``harness_compare.py``.  Models
are folders; ``llama-like`` is a tiny random Llama with a tokenizer like Llama's, made here (``llama_like.py``).
Windows are the models' own, as each side finds them out.  Nothing is downloaded; lm_eval has to be installed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness_compare import Comparison, as_json, compare
from harness_files import write_files
from harness_report import report
from harness_routers import router_gap
from harness_sides import harness_model, run_harness, run_moeq
from harness_speed import Speed, measure_speed
from llama_like import llama_like
from origin import origin

from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.tasks.encode import window_of

TASKS = (
    "winogrande", "copa", "openbookqa", "hellaswag", "piqa", "boolq", "arc_easy", "arc_challenge", "mathqa", "sciq",
    "lambada_openai", "mmlu", "wikitext", "c4_sample",
)  # fmt: skip
MODELS = ("assets/reference-moe", "llama-like")


def main(args: Sequence[str] | None = None) -> None:
    """Compare or time, print and write tables; exits with 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of all data sets")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=" ".join(TASKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help="folders, or llama-like")
    parser.add_argument("--num-documents", type=int, help="per task, evenly spread; default: all")
    parser.add_argument("--quick", action="store_true", help="4 documents per task")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward pass of the harness")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per forward pass of moeq")
    parser.add_argument("--speed", action="store_true", help="time both instead")
    parser.add_argument("--repeats", type=int, default=3, help="of --speed")
    parser.add_argument("--folder", type=Path, default=Path("runs/harness"), help="written rows and models")
    parser.add_argument("--output", type=Path, help="write the Markdown report here")
    parser.add_argument("--json", type=Path, help="write everything that was found here")
    options = parser.parse_args(args)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.quick:
        options.num_documents = 4
    # How the report names its command: whoever runs it has the data somewhere else.
    given = ["DATA" if value == str(options.data_dir) else value for value in (sys.argv[1:] if args is None else args)]
    results: dict[str, dict[str, Any]] = {}
    for name in options.models:
        model, tokenizer = open_model(name, options.folder)
        for task in options.tasks:
            found = (time_task if options.speed else compare_task)(model, tokenizer, task, options)
            results.setdefault(name, {})[task] = found
            print(f"{name}, {task}: {_summary(found)}", flush=True)
    command = origin(__file__, given)
    text = report(results, command, options.repeats)
    print(f"\n{text}")
    plain = {"origin": command, "num_documents": options.num_documents, "results": _plain(results)}
    for path, content in ((options.output, text), (options.json, json.dumps(plain, indent=1))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
    if any(found.problems for tasks in results.values() for found in tasks.values() if isinstance(found, Comparison)):
        sys.exit(1)


def open_model(name: str, folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder in float32; ``llama-like`` is written first."""
    if name == "llama-like":
        model, tokenizer = llama_like()
        name = str(folder / name)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return load_model(name, "float32"), load_tokenizer(name)


def compare_task(model: Any, tokenizer: Any, name: str, options: Any) -> Comparison:
    """One task on both sides."""
    files = write_files(name, options.data_dir, options.folder, options.num_documents)
    window = window_of(model.config, tokenizer)
    other_window = harness_model(model, tokenizer, options.batch_size).max_length
    assert window == other_window, f"the window is {window} tokens, in the harness {other_window}"
    ours = run_moeq(model, tokenizer, files, window, options.batch_tokens)
    theirs = run_harness(model, tokenizer, files, options.batch_size)
    return compare(files.task, ours, theirs, partial(router_gap, model))


def time_task(model: Any, tokenizer: Any, name: str, options: Any) -> Speed:
    """Speed of both sides on one task."""
    few = options.num_documents and max(1, options.num_documents // 4)
    files = write_files(name, options.data_dir, options.folder / "timed", options.num_documents)
    trial = write_files(name, options.data_dir, options.folder / "warm_up", few)
    return measure_speed(model, tokenizer, files, trial, options.batch_tokens, options.repeats)


def _summary(found: Comparison | Speed) -> str:
    if isinstance(found, Speed):
        return f"{found}, ratios {found.ratios('clock')}"
    return f"{found.documents} documents, {len(found.ties)} ties, {found.relative:.1e}, differences: {found.problems}"


def _plain(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        model: {task: as_json(found) if isinstance(found, Comparison) else vars(found) for task, found in tasks.items()}
        for model, tasks in results.items()
    }


if __name__ == "__main__":
    main()
