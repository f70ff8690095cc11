"""MathQA (Amini et al., 2019; Apache-2.0): word problems with five answers; as in lm-evaluation-harness."""

import re

from moeq.tasks.task import DataRow, MultipleChoice, Source


def _choices(row: DataRow) -> list[str]:
    """From "a ) 38 , b ) 27.5 , ... , e ) 30"."""
    return [option[4:].rstrip(" ,") for option in re.findall(r"[abcd] \) .*?, |e \) .*?$", row["options"])]


TASK = MultipleChoice(
    name="mathqa",
    source=Source("mathqa", hub="regisss/math_qa", splits=("test", "validation")),
    context=lambda row: f"Question: {row['Problem']}\nAnswer:",
    choices=_choices,
    answer=lambda row: "abcde".index(row["correct"]),
)
