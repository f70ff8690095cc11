"""Documents per second of moeq and of lm-evaluation-harness on the same rows, model, CPU, dtype and threads.

Timed is everything from rows in files or in memory to metrics: moeq reads its rows, and both make prompts, tokenize,
run the model and score.  Not timed: reading the model, and the harness's reading of its rows; it draws no bootstrap
samples.  The harness has the batch size, of ``BATCH_SIZES``, with which it was fastest on the same rows before; these
runs and one of moeq are the warm-up.  Then both run in turn, and each turn gives a ratio.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from harness_files import Files
from harness_sides import harness_model, harness_tasks, run_moeq

from moeq.tasks.encode import window_of

BATCH_SIZES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Speed:
    """What was timed.

    Attributes:
        documents: How many.
        batch_size: Of the harness.
        harness_seconds: Of each turn.
        moeq_seconds: Of each turn.
        trials: Seconds of the harness with each batch size, in the warm-up.
    """

    documents: int
    batch_size: int
    harness_seconds: tuple[float, ...]
    moeq_seconds: tuple[float, ...]
    trials: dict[int, float]

    @property
    def harness(self) -> float:
        """Documents per second."""
        return self.documents / median(self.harness_seconds)

    @property
    def moeq(self) -> float:
        """Documents per second."""
        return self.documents / median(self.moeq_seconds)

    @property
    def ratios(self) -> list[float]:
        """Of each turn."""
        return [theirs / ours for theirs, ours in zip(self.harness_seconds, self.moeq_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the turns."""
        return median(self.ratios)


def measure_speed(model: Any, tokenizer: Any, files: Files, options: Any) -> Speed:
    """Time both sides, the first of which changes with every turn."""
    trials = {size: _time_harness(model, tokenizer, files, size)[0] for size in BATCH_SIZES}
    batch_size = min(trials, key=trials.__getitem__)
    _time_moeq(model, tokenizer, files, options.batch_tokens)
    theirs, ours, documents = [], [], 0
    for turn in range(options.repeats):
        if turn % 2:
            ours.append(_time_moeq(model, tokenizer, files, options.batch_tokens))
        seconds, documents = _time_harness(model, tokenizer, files, batch_size)
        theirs.append(seconds)
        if not turn % 2:
            ours.append(_time_moeq(model, tokenizer, files, options.batch_tokens))
    return Speed(documents, batch_size, tuple(theirs), tuple(ours), trials)


def _time_harness(model: Any, tokenizer: Any, files: Files, batch_size: int) -> tuple[float, int]:
    """Seconds and documents."""
    import lm_eval

    tasks, view = harness_tasks(files), harness_model(model, tokenizer, batch_size)
    start = perf_counter()
    results = lm_eval.evaluate(view, tasks, bootstrap_iters=0, log_samples=False)
    seconds = perf_counter() - start
    assert results is not None
    return seconds, sum(results["n-samples"][name]["effective"] for name in files.names)


def _time_moeq(model: Any, tokenizer: Any, files: Files, batch_tokens: int) -> float:
    window = window_of(model.config, tokenizer)
    start = perf_counter()
    run_moeq(model, tokenizer, files, window, batch_tokens)
    return perf_counter() - start
