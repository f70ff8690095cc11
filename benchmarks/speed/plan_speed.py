"""How fast models of the same shapes are beside each other: decoding some sequences at once, reading a prompt.

Sides run in turn.  Times are processor seconds, which other work on the machine disturbs less than the clock.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import process_time
from typing import Protocol

import torch
from transformers import PreTrainedModel

from benchmarks.speed.packed_decode import PROMPT, step_seconds

COUNTERS = Path("/sys/class/powercap")
# By task, then side: seconds in every turn.
Seconds = dict[str, dict[str, list[float]]]


class Runtime(Protocol):
    """A model that a runtime has opened and times itself: ``LlamaCpp``, ``MlxLm``."""

    def step_seconds(self, sequences: int, prompt: int, num_tokens: int) -> list[float]:
        """Processor seconds of each of some tokens after a prompt, of several sequences at once."""

    def prompt_seconds(self, length: int) -> float:
        """Processor seconds of reading one prompt."""


def in_turns(sides: Mapping[str, PreTrainedModel | Runtime], tasks: Mapping[str, int], turns: int) -> Seconds:
    """Processor seconds of each task and side in every turn: of a step of decoding (a median), or of a whole prompt.

    Args:
        sides: Models, in transformers or another runtime.
        tasks: "decode N" with tokens to decode, "prompt" with tokens to read.
        turns: Each has every task of every side once.
    """
    found: Seconds = {task: {name: [] for name in sides} for task in tasks}
    for _ in range(turns):
        for task, num_tokens in tasks.items():
            for name, side in sides.items():
                found[task][name].append(_seconds(side, task, num_tokens))
    return found


@torch.no_grad()
def _seconds(side: PreTrainedModel | Runtime, task: str, num_tokens: int) -> float:
    kind, _, num = task.partition(" ")
    if isinstance(side, PreTrainedModel):
        if kind == "prompt":
            return prompt_seconds(side, num_tokens)
        return median(step_seconds(side, int(num), num_tokens))
    if kind == "prompt":
        return side.prompt_seconds(num_tokens)
    return median(side.step_seconds(int(num), PROMPT, num_tokens))


def prompt_seconds(model: PreTrainedModel, length: int) -> float:
    """Processor seconds of reading one prompt."""
    ids_1L = torch.randint(0, model.config.vocab_size, (1, length))
    start = process_time()
    model(ids_1L, use_cache=True, logits_to_keep=1)
    return process_time() - start


def joules() -> float | None:
    """What the processors of this machine have used so far; None where it does not count."""
    counters = list(COUNTERS.glob("intel-rapl:?/energy_uj"))
    return sum(int(path.read_text()) for path in counters) / 1e6 if counters else None
