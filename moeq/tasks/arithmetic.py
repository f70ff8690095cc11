"""Exact match on integer arithmetic: lines such as ``37 + 58 = 95``, answered by greedy decoding.

A problem's prompt is a few other full lines of the file (the shots) and the line up to and including ``=``; its
answer is the integer after it.  The model continues greedily, and its answer is what stands before the next newline,
right only where that is the same integer and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

_LINE = re.compile(r"(\d+ [-+*] \d+ =) (-?\d+)")
_ANSWER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Sum:
    """Text to continue and the integer that should follow it."""

    prompt: str
    answer: str


def parse_line(line: str) -> tuple[str, str]:
    """Split ``37 + 58 = 95`` into ``("37 + 58 =", "95")``; raises ValueError for any other kind of line."""
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"arithmetic line {line!r} must look like '37 + 58 = 95' (operators + - *); correct the file")
    return match[1], match[2]


def build_problems(lines: Sequence[str], num_problems: int, num_shots: int) -> list[Sum]:
    """Problems from lines evenly spread over the file, each after the ``num_shots`` lines before it (cyclic).

    A line that states the problem itself is never one of its shots.

    Raises:
        ValueError: Fewer lines than problems or shots ask for, or a malformed line.
    """
    needed = max(num_problems, num_shots + 1)
    if len(lines) < needed:
        raise ValueError(f"the arithmetic file has {len(lines)} lines, fewer than the {needed} needed; ask for less")
    problems = []
    for index in (i * len(lines) // num_problems for i in range(num_problems)):
        question, answer = parse_line(lines[index])
        before = (lines[(index - back) % len(lines)].strip() for back in range(1, len(lines)))
        shots = list(islice((line for line in before if parse_line(line)[0] != question), num_shots))
        problems.append(Sum("".join(f"{line}\n" for line in reversed(shots)) + question, answer))
    return problems


def parse_answer(continuation: str) -> str:
    """The integer that makes up the first line of a continuation; empty where that line is anything else."""
    first_line = continuation.split("\n", 1)[0].strip()
    return first_line if _ANSWER.fullmatch(first_line) else ""
