"""Tokens per second of EBSS against the textbook loop and against beam search of transformers, on the reference model.

    python benchmarks/ebss.py                          # lengths 64 to 512, 3 repeats
    python benchmarks/ebss.py --quick                  # lengths 16 and 32, few sequences: seconds
    python benchmarks/ebss.py --json benchmarks/results/ebss_speed.json    # also writes ebss_speed.md beside it

``ours`` grows many sequences with 4 branches each in one batch (paper mode).  ``textbook`` is the same search on one
sequence at a time, its branches in one batch, that runs whole sequences again at each step and counts experts block by
block; it writes fewer sequences of the same length.  ``generate`` is ``model.generate(num_beams=4)`` on the batch of
ours; it counts no experts.  All three run one after another in every repeat and length, as wall time and as
processor time, which other processes on the machine disturb less.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.solve import provenance
from moeq.checkpoint.loading import load_model
from moeq.sampling.ebss import EBSSSpec, search
from moeq.sampling.next_token import ExpertCounter, ModelNextToken

BRANCHES = 4
METHODS = ("ours", "textbook", "generate")
# Share of its wall time for which a method has a processor; below it, other work decided the wall time.
UNDISTURBED = 0.8


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


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard deviation, the latter from two values on."""
    return f"{mean(values):{form}}" + (f" +- {stdev(values):{form}}" if len(values) > 1 else "")


def rates(rows: list[dict[str, Any]], length: int, method: str, clock: str) -> list[float]:
    """Tokens per second of the repeats of one length."""
    return [row[method]["tokens"] / row[method][clock] for row in rows if row["length"] == length]


def tables(rows: list[dict[str, Any]], scaling: list[dict[str, Any]]) -> str:
    """Markdown: rates and ratios per length, and time per token over the number of sequences."""
    head = "| length | repeats | clock | ours, tokens/s | textbook | generate | ours / textbook | ours / generate |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for length in dict.fromkeys(row["length"] for row in rows):
        shares = [
            min(row[name]["cpu"] / row[name]["wall"] for name in METHODS) for row in rows if row["length"] == length
        ]
        wall = "wall" if min(shares) > UNDISTURBED else f"wall, disturbed: processor for {min(shares):.0%} of it"
        for clock, label in (("wall", wall), ("cpu", "processor")):
            fast, slow, theirs = (rates(rows, length, name, clock) for name in METHODS)
            ratios = [spread([a / b for a, b in zip(fast, other, strict=True)], ".2f") for other in (slow, theirs)]
            cells = [f"{length}", f"{len(fast)}", label, spread(fast), spread(slow), spread(theirs), *ratios]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Time per token over the number of sequences, length {scaling[0]['length']}:" if scaling else "", ""]
    lines += ["| sequences | repeats | wall ms/token | processor ms/token |", "|---|---|---|---|"] if scaling else []
    for number in dict.fromkeys(row["sequences"] for row in scaling):
        group = [row for row in scaling if row["sequences"] == number]
        clocks = [spread([1e3 * row[clock] / row["tokens"] for row in group], ".2f") for clock in ("wall", "cpu")]
        lines.append(f"| {number} | {len(group)} | {' | '.join(clocks)} |")
    return "\n".join(lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]], scaling: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Rows as JSON, tables as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows, "scaling": scaling}, indent=1) + "\n")
    header = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    title = f"# Speed of EBSS on the reference model\n\n{header}\n\nMean +- deviation over repeats"
    path.with_suffix(".md").write_text(
        f"{title}, {BRANCHES} branches; `benchmarks/ebss.py`.\n\n{tables(rows, scaling)}"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="lengths 16 and 32, 4 sequences, one repeat")
    parser.add_argument("--seeds", type=int, default=3, help="repeats, with first tokens of their own (default 3)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--sequences", type=int, default=64, help="of ours and of generate (default 64)")
    parser.add_argument("--textbook", type=int, default=1, help="sequences of the textbook loop (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, and tables beside it as .md")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds ({options.seeds}) must be at least 1; the usual value is 3")
    if options.quick:
        options.lengths, options.sequences, options.seeds = [16, 32], 4, 1
    model = load_model(str(Path(__file__).resolve().parents[1] / "assets/reference-moe"))
    facts = {**provenance(), "sequences": options.sequences, "textbook_sequences": options.textbook}
    facts |= {"threads": torch.get_num_threads(), "dtype": str(model.dtype)}
    for warm_up in (ours, textbook, generate):
        warm_up(model, 12, 2, 0)
    rows: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for number in [1, 4, 16, 64][: 2 if options.quick else 4]:
            measured = timed(lambda n=number, s=seed: ours(model, options.lengths[0], n, s))  # type: ignore[misc]
            scaling.append({"seed": seed, "sequences": number, "length": options.lengths[0], **measured})
        for length in options.lengths:
            row: dict[str, Any] = {"seed": seed, "length": length, "load": os.getloadavg()[0]}
            works = {"ours": ours, "generate": generate, "textbook": textbook}
            for name, work in works.items():
                number = options.textbook if name == "textbook" else options.sequences
                row[name] = timed(lambda w=work, t=length, n=number, s=seed: w(model, t, n, s))  # type: ignore[misc]
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.json:  # as it goes: a run that is cut short keeps its finished rows
                write(options.json, rows, scaling, facts)
    print(f"\n{tables(rows, scaling)}")


if __name__ == "__main__":
    main()
