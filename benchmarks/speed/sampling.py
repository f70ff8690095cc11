"""Tokens per second of EBSS against the textbook loop and against beam search of transformers, on the reference model.

    python -m benchmarks.speed.sampling                          # lengths 64 to 512, 3 repeats
    python -m benchmarks.speed.sampling --quick                  # lengths 16 and 32, few sequences: seconds
    python -m benchmarks.speed.sampling --json benchmarks/results/sampling.json

``ours`` grows many sequences with 4 branches each in one batch (paper mode).  ``textbook`` is the same search on one
sequence at a time, its branches in one batch, that runs whole sequences again at each step and counts experts block by
block; it writes fewer sequences of the same length.  ``generate`` is ``model.generate(num_beams=4)`` on the batch of
ours; it counts no experts.  All three run one after another in every repeat and length, as wall time and as
processor time, which other processes on the machine disturb less.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.lab.study import MODEL, Study
from benchmarks.lab.tables import Row, cell, grouped, markdown
from moeq.checkpoint.loading import load_model
from moeq.sampling.ebss import EBSSSpec, search
from moeq.sampling.next_token import ExpertCounter, ModelNextToken

BRANCHES = 4
METHODS = ("ours", "textbook", "generate")
# Share of its wall time for which a method has a processor; below it, other work decided the wall time.
UNDISTURBED = 0.8


@dataclass(frozen=True)
class Case:
    """One repeat at one length, with first tokens of its own; or ours alone with few or many sequences."""

    seed: int
    length: int
    sequences: int
    scaling: bool


class Sampling(Study[Case]):
    """Every length with all three, and every number of sequences at the shortest."""

    title = "Speed of EBSS on the reference model"
    legend = f"Mean +- deviation over repeats, {BRANCHES} branches."
    quick: ClassVar = {"seeds": [0], "lengths": [16, 32], "sequences": 4, "numbers": [1, 4]}
    keeps = False
    threads = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
        parser.add_argument("--sequences", type=int, default=64, help="of ours and of generate (default 64)")
        parser.add_argument("--textbook", type=int, default=1, help="sequences of the textbook loop (default 1)")
        parser.add_argument("--numbers", type=int, nargs="+", default=[1, 4, 16, 64], help="of sequences, ours alone")

    @cached_property
    def model(self) -> Any:
        """The reference model, on which every method has run once."""
        model = load_model(MODEL)
        for warm_up in (ours, textbook, generate):
            warm_up(model, 12, 2, 0)
        return model

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def cases(self) -> list[Case]:
        o, cases = self.options, []
        for seed in o.seeds:
            cases += [Case(seed, o.lengths[0], number, True) for number in o.numbers]
            cases += [Case(seed, length, o.sequences, False) for length in o.lengths]
        return cases

    def measure(self, case: Case) -> Row:
        if case.scaling:
            return timed(partial(ours, self.model, case.length, case.sequences, case.seed))
        row: Row = {"load": os.getloadavg()[0]}
        for name, work in {"ours": ours, "generate": generate, "textbook": textbook}.items():
            number = self.options.textbook if name == "textbook" else case.sequences
            row[name] = timed(partial(work, self.model, case.length, number, case.seed))
        return row

    def report(self, rows: Sequence[Row]) -> str:
        alone, together = ([row for row in rows if row["scaling"] is kind] for kind in (True, False))
        return "\n".join([*([speeds(together)] if together else []), *([scaling(alone)] if alone else [])])


class Textbook:
    """A ``NextToken`` without a cache: whole sequences again at every step."""

    def __init__(self, model: Any, counter: ExpertCounter) -> None:
        self.model, self.counter = model, counter
        self.ids_NT = torch.empty(0, 0, dtype=torch.int64)
        self.counts_NLE = torch.empty(0)

    def prefill(self, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Start the rows."""
        self.ids_NT = ids_NT
        log_prob_NV, self.counts_NLE = self.forward()
        return log_prob_NV, self.counts_NLE

    def step(self, parent_N: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token; its counts are those of the sequence less those of its parent."""
        self.ids_NT = torch.cat([self.ids_NT[parent_N], token_N[:, None]], 1)
        before_NLE = self.counts_NLE[parent_N]
        log_prob_NV, self.counts_NLE = self.forward()
        return log_prob_NV, self.counts_NLE - before_NLE

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        """The last position's log-probabilities, and counts over all positions."""
        logits = self.model(self.ids_NT, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float().log_softmax(-1), self.counter.take(len(self.ids_NT))


def first_tokens(model: Any, number: int, seed: int) -> Tensor:
    """Distinct ids; the end of text, which is token 0, is not among them."""
    return 1 + torch.randperm(model.config.vocab_size - 1, generator=torch.Generator().manual_seed(seed))[:number]


def ours(model: Any, length: int, number: int, seed: int) -> int:
    """Tokens written by the search in one batch."""
    with ModelNextToken(model) as next_token:
        spec = EBSSSpec(length=length, branches=BRANCHES, mode="paper")
        sampled = search(next_token, spec, first_tokens(model, number, seed), torch.Generator().manual_seed(seed))
    return sampled.ids_NT.numel()


def textbook(model: Any, length: int, number: int, seed: int) -> int:
    """Tokens written by the search without a cache, one sequence after another."""
    spec, generator = EBSSSpec(length=length, branches=BRANCHES, mode="paper"), torch.Generator().manual_seed(seed)
    with ExpertCounter(model) as counter:
        for first_N in first_tokens(model, number, seed).split(1):
            search(Textbook(model, counter), spec, first_N, generator)
    return number * length


def generate(model: Any, length: int, number: int, seed: int) -> int:
    """Tokens written by beam search of transformers, without an end-of-text token that would stop it early."""
    ids_N1 = first_tokens(model, number, seed)[:, None]
    ids_NT = model.generate(
        ids_N1,
        attention_mask=torch.ones_like(ids_N1),
        num_beams=BRANCHES,
        do_sample=False,
        max_length=length,
        min_length=length,
        eos_token_id=None,
    )
    assert ids_NT.shape == (number, length)
    return int(ids_NT.numel())


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Tokens, wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = work()
    return {"tokens": tokens, "wall": time.perf_counter() - wall, "cpu": time.process_time() - processor}


def rates(rows: Sequence[Row], method: str, clock: str) -> list[float]:
    """Tokens per second of the repeats."""
    return [row[method]["tokens"] / row[method][clock] for row in rows]


def speeds(rows: Sequence[Row]) -> str:
    """Markdown: rates and ratios per length."""
    lines = []
    for length, group in grouped(rows, lambda row: row["length"]).items():
        share = min(row[name]["cpu"] / row[name]["wall"] for name in METHODS for row in group)
        wall = "wall" if share > UNDISTURBED else f"wall, disturbed: processor for {share:.0%} of it"
        for clock, label in (("wall", wall), ("cpu", "processor")):
            fast, slow, theirs = (rates(group, name, clock) for name in METHODS)
            ratios = [cell([a / b for a, b in zip(fast, other, strict=True)]) for other in (slow, theirs)]
            lines.append([length, len(fast), label, *(cell(each, ".1f") for each in (fast, slow, theirs)), *ratios])
    head = ("ours, tokens/s", "textbook", "generate", "ours / textbook", "ours / generate")
    return markdown(["length", "repeats", "clock", *head], lines)


def scaling(rows: Sequence[Row]) -> str:
    """Markdown: time per token over the number of sequences."""
    lines = []
    for number, group in grouped(rows, lambda row: row["sequences"]).items():
        clocks = [cell([1e3 * row[clock] / row["tokens"] for row in group]) for clock in ("wall", "cpu")]
        lines.append([number, len(group), *clocks])
    table = markdown(["sequences", "repeats", "wall ms/token", "processor ms/token"], lines)
    return f"Time per token over the number of sequences, length {rows[0]['length']}:\n\n{table}"


if __name__ == "__main__":
    Sampling.main()
