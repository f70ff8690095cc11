r"""Documents per second of moeq and of lm-evaluation-harness on the same rows, model, CPU, dtype and threads.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.evaluation --data-dir DATA --num-documents 400 \
        --json benchmarks/results/evaluation.json

Timed is everything from rows to metrics: both make prompts, tokenize, run the model and score; moeq also reads its
files, and the harness draws no bootstrap samples and keeps no samples.  Not timed: reading the model, and the harness's
reading of its files.  The harness has the batch size, of ``BATCH_SIZES``, with which it was fastest on a quarter of the
rows; these runs, and one of moeq, are the warm-up.  Then both run in turn, and each turn gives a ratio, by the clock
and by the processor's time, which other work on the machine disturbs less.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

from benchmarks.harness.files import Files, write_files
from benchmarks.harness.models import open_model, origin, parser, prepare, write
from benchmarks.harness.sides import harness_model, harness_tasks, run_moeq
from benchmarks.lab.tables import markdown
from moeq.tasks.encode import window_of

BATCH_SIZES = (1, 4, 16, 64)
TASKS, MODELS = ("hellaswag", "mmlu"), ("assets/reference-moe",)


class Seconds(NamedTuple):
    """Of one run."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Speed:
    """What was timed.

    Attributes:
        documents: How many.
        batch_size: Of the harness.
        harness: Of each turn.
        moeq: Of each turn.
        trials: Of the harness with each batch size, in the warm-up.
    """

    documents: int
    batch_size: int
    harness: tuple[Seconds, ...]
    moeq: tuple[Seconds, ...]
    trials: dict[int, Seconds]

    def per_second(self, side: str) -> float:
        """Documents per second by the clock, median of the turns."""
        return self.documents / median(seconds.clock for seconds in getattr(self, side))

    def ratios(self, kind: str) -> list[float]:
        """How many times faster moeq is, by "clock" or "processor", in each turn."""
        return [
            getattr(theirs, kind) / getattr(ours, kind) for theirs, ours in zip(self.harness, self.moeq, strict=True)
        ]


def measure_speed(model: Any, tokenizer: Any, files: Files, trial: Files, batch_tokens: int, repeats: int) -> Speed:
    """Time both sides, the first of which changes with every turn.

    Args:
        model: In eval mode.
        tokenizer: Of the model.
        files: Rows of the task.
        trial: Fewer of them, for the warm-up.
        batch_tokens: Of moeq.
        repeats: Turns.
    """
    trials = {size: _time_harness(model, tokenizer, trial, size)[0] for size in BATCH_SIZES}
    batch_size = min(trials, key=trials.__getitem__)
    _time_moeq(model, tokenizer, trial, batch_tokens)
    theirs, ours, documents = [], [], 0
    for turn in range(repeats):
        if turn % 2:
            ours.append(_time_moeq(model, tokenizer, files, batch_tokens))
        seconds, documents = _time_harness(model, tokenizer, files, batch_size)
        theirs.append(seconds)
        if not turn % 2:
            ours.append(_time_moeq(model, tokenizer, files, batch_tokens))
    return Speed(documents, batch_size, tuple(theirs), tuple(ours), trials)


def _time_harness(model: Any, tokenizer: Any, files: Files, batch_size: int) -> tuple[Seconds, int]:
    """Its seconds, and documents."""
    import lm_eval

    tasks, view = harness_tasks(files), harness_model(model, tokenizer, batch_size)
    start = _now()
    results = lm_eval.evaluate(view, tasks, bootstrap_iters=0, log_samples=False)
    seconds = _since(start)
    assert results is not None
    return seconds, sum(results["n-samples"][name]["effective"] for name in files.names)


def _time_moeq(model: Any, tokenizer: Any, files: Files, batch_tokens: int) -> Seconds:
    window = window_of(model.config, tokenizer)
    start = _now()
    run_moeq(model, tokenizer, files, window, batch_tokens)
    return _since(start)


def _now() -> Seconds:
    return Seconds(perf_counter(), process_time())


def _since(start: Seconds) -> Seconds:
    return Seconds(*(end - begin for end, begin in zip(_now(), start, strict=True)))


def report(results: Mapping[str, Mapping[str, Speed]], source: str) -> str:
    """A table of documents per second."""
    lines, turns = [], 0
    for model, tasks in results.items():
        for task, found in tasks.items():
            turns = len(found.moeq)
            ratios = [
                f"{median(of_turns):.2f} ({min(of_turns):.2f} to {max(of_turns):.2f})"
                for of_turns in (found.ratios("clock"), found.ratios("processor"))
            ]
            rates = [f"{found.per_second(side):.2f}" for side in ("harness", "moeq")]
            lines.append([model, task, found.documents, found.batch_size, *rates, *ratios])
    head = ("harness", "moeq", "ratio", "by processor time")
    table = markdown(["model", "task", "documents", "batch size of the harness", *head], lines)
    return (
        f"# Speed against lm-evaluation-harness\n\n{source}; float32.\n\nDocuments per second, medians of {turns} "
        "turns; ratios with the smallest and the largest of a turn.  What is timed: `benchmarks/speed/evaluation.py`."
        f"\n\n{table}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Time both sides on every task, print and write the table."""
    arguments = parser(__doc__, TASKS, MODELS)
    arguments.add_argument("--repeats", type=int, default=3, help="turns")
    options = arguments.parse_args(args)
    prepare(options)
    results: dict[str, dict[str, Speed]] = {}
    for name in options.models:
        model, tokenizer = open_model(name, options.folder)
        for task in options.tasks:
            found = time_task(model, tokenizer, task, options)
            results.setdefault(name, {})[task] = found
            print(f"{name}, {task}: {found}, ratios {found.ratios('clock')}", flush=True)
    source = origin(__name__, options, args)
    plain = {model: {task: vars(found) for task, found in tasks.items()} for model, tasks in results.items()}
    write(options, source, report(results, source).rstrip(), plain)


def time_task(model: Any, tokenizer: Any, name: str, options: argparse.Namespace) -> Speed:
    """Speed of both sides on one task."""
    few = options.num_documents and max(1, options.num_documents // 4)
    files = write_files(name, options.data_dir, options.folder / "timed", options.num_documents)
    trial = write_files(name, options.data_dir, options.folder / "warm_up", few)
    return measure_speed(model, tokenizer, files, trial, options.batch_tokens, options.repeats)


if __name__ == "__main__":
    main()
