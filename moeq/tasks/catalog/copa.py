"""COPA of SuperGLUE (Roemmele et al., 2011; BSD 2-clause): the more plausible cause or effect.

As in lm-evaluation-harness, whose choices begin with a blank of their own after the delimiter: two blanks.
"""

from moeq.tasks.task import DataRow, MultipleChoice, Source

CONNECTORS = {"cause": "because", "effect": "therefore"}


def _choice(text: str) -> str:
    return " " + text[0].lower() + text[1:]


def _context(row: DataRow) -> str:
    return f"{row['premise'].strip()[:-1]} {CONNECTORS[row['question']]}"


TASK = MultipleChoice(
    name="copa",
    source=Source("copa", hub="aps/super_glue", config="copa"),
    context=_context,
    choices=lambda row: [_choice(row["choice1"]), _choice(row["choice2"])],
    answer=lambda row: int(row["label"]),
    metrics={"acc": "mean"},
)
