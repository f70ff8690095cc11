"""Sums such as ``37 + 58 = 95`` after four others: what the bundled reference model was trained to continue.

The repository's own; the file is in the folder of the reference model's texts.  A row is a line of it, a document the
line with the four lines before it, none of which states the same problem.
"""

from collections.abc import Sequence

from moeq.tasks.arithmetic import build_problems, parse_answer
from moeq.tasks.task import DataRow, Generation, Source

NUM_SHOTS = 4


def _problems(rows: Sequence[DataRow]) -> list[DataRow]:
    lines = [row["text"] for row in rows if row["text"]]
    problems = build_problems(lines, len(lines), NUM_SHOTS)
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]


TASK = Generation(
    name="sums",
    source=Source(".", hub=None, splits=("arithmetic_sums",)),
    prepare=_problems,
    documents=200,
    prompt=lambda row: row["prompt"],
    target=lambda row: f" {row['answer']}\n",
    stop=("\n",),
    max_new_tokens=8,
    score_text=lambda row, text: {"exact_match": (float(parse_answer(text) == row["answer"]), 1.0)},
    metrics={"exact_match": "mean"},
)
