"""BoolQ of SuperGLUE (Clark et al., 2019; CC BY-SA 3.0): yes or no by a passage.

As in lm-evaluation-harness.  SuperGLUE's passage starts with the title, and its label is 1 for yes; rows of
the original data set have ``title`` and the truth value ``answer`` instead.
"""

from moeq.tasks.task import DataRow, MultipleChoice, Source


def _context(row: DataRow) -> str:
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]
    return f"{passage}\nQuestion: {row['question']}?\nAnswer:"


TASK = MultipleChoice(
    name="boolq",
    source=Source("boolq", hub="aps/super_glue", config="boolq"),
    context=_context,
    choices=lambda row: ["no", "yes"],
    answer=lambda row: int(row["label"] if "label" in row else row["answer"]),
    metrics={"acc": "mean"},
)
