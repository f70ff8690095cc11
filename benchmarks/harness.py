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
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness_compare import TOLERANCE, Comparison, as_json, compare
from harness_files import write_files
from harness_sides import harness_model, run_harness, run_moeq
from harness_speed import Speed, measure_speed
from llama_like import llama_like
from origin import origin

from moeq.models.loading import load_model, load_tokenizer
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
    report = speed_report(results) if options.speed else comparison_report(results)
    report = f"{_head(options, given)}\n\n{report}"
    print(f"\n{report}")
    for path, text in ((options.output, report), (options.json, json.dumps(_plain(results, options, given), indent=1))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.rstrip() + "\n")
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
    theirs = harness_model(model, tokenizer, options.batch_size).max_length
    assert window == theirs, f"the window is {window} tokens, in the harness {theirs}"
    ours = run_moeq(model, tokenizer, files, window, options.batch_tokens)
    return compare(files.task, ours, run_harness(model, tokenizer, files, options.batch_size))


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


def comparison_report(results: dict[str, dict[str, Comparison]]) -> str:
    """A table per model, then ties and problems."""
    lines = []
    for model, tasks in results.items():
        lines += [
            f"\n## {model}\n",
            "| task | documents | cut | continuations | largest difference (nats) | relative | moeq | harness "
            "| ties | equal |",
            "|---|---:|---:|---:|---:|---:|---|---|---:|---|",
        ]
        for task, found in tasks.items():
            lines.append(
                f"| {task} | {found.documents} | {found.num_cut} | {found.continuations} | {found.difference:.1e} "
                f"| {found.relative:.1e} | {_metrics(found, 'moeq')} | {_metrics(found, 'harness')} "
                f"| {len({(tie.name, tie.index) for tie in found.ties})} | {'no' if found.problems else 'yes'} |"
            )
    ties = [
        f"- {model}: {tie.name} {tie.index}, {tie.metric}, {tie.gap:.1e}, {'same' if tie.agreed else 'another'} answer"
        for model, tasks in results.items()
        for found in tasks.values()
        for tie in found.ties
    ]
    problems = [
        f"- {model}: {problem}"
        for model, tasks in results.items()
        for found in tasks.values()
        for problem in found.problems
    ]
    heading = "\n## Ties (document, metric, gap between the two best choices)\n"
    return "\n".join([*lines, heading, *(ties or ["None."]), "\n## What differs\n", *(problems or ["Nothing."])])


def _metrics(found: Comparison, side: str) -> str:
    # Of MMLU the metrics of the whole come last.
    metrics = found.measured["mmlu" if "mmlu" in found.measured else next(iter(found.measured))]
    cells = []
    for metric, of_side in metrics.items():
        value, stderr = of_side[side]
        cells.append(f"{metric} {value:.6g}" + ("" if stderr is None else f" +- {stderr:.3g}"))
    return ", ".join(cells)


def speed_report(results: dict[str, dict[str, Speed]]) -> str:
    """A table of documents per second."""
    lines = [
        "| model | task | documents | batch size of the harness | harness | moeq | ratio | by processor time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, tasks in results.items():
        for task, found in tasks.items():
            ratios = [
                f"{median(of_turns):.2f} ({min(of_turns):.2f} to {max(of_turns):.2f})"
                for of_turns in (found.ratios("clock"), found.ratios("processor"))
            ]
            lines.append(
                f"| {model} | {task} | {found.documents} | {found.batch_size} | {found.per_second('harness'):.2f} "
                f"| {found.per_second('moeq'):.2f} | {' | '.join(ratios)} |"
            )
    return "\n".join(lines)


def _head(options: Any, given: Sequence[str]) -> str:
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "torch", "transformers"))
    title = "Speed against lm-evaluation-harness" if options.speed else "Equality with lm-evaluation-harness"
    text = f"# {title}\n\n{origin(__file__, given)}; {versions}; float32, {torch.get_num_threads()} thread."
    if options.speed:
        return (
            f"{text}\n\nDocuments per second, medians of {options.repeats} turns; ratios with the smallest and the largest "
            "of a turn.  What is timed: `benchmarks/harness_speed.py`."
        )
    return (
        f"{text}\n\nDocuments that were longer than the model's window were cut by both sides (column cut). "
        f"Log-likelihoods are equal to {TOLERANCE:g} max(1, |x|), accuracies and their standard errors to the last bits "
        "but for ties, of MMLU those of each subject (the table has the whole, whose standard error the harness pools "
        "from the subjects'). Standard errors of perplexities are not compared: the harness has bootstrap samples for "
        "LAMBADA and none for texts. More in `benchmarks/harness_compare.py`."
    )


def _plain(results: dict[str, dict[str, Any]], options: Any, given: Sequence[str]) -> dict[str, Any]:
    return {
        "origin": origin(__file__, given),
        "num_documents": options.num_documents,
        "results": {
            model: {
                task: as_json(found) if isinstance(found, Comparison) else vars(found) for task, found in tasks.items()
            }
            for model, tasks in results.items()
        },
    }


if __name__ == "__main__":
    main()
