"""WinoGrande XL (Sakaguchi et al., 2019; CC BY): which of two names fills the blank, by what the rest is worth then.

As in lm-evaluation-harness: the sentence up to the blank, filled, is the context; the rest is scored.
"""

from moeq.tasks.task import Cloze, DataRow, Source


def _filled(row: DataRow) -> list[str]:
    before = row["sentence"][: row["sentence"].index("_")]
    return [before + row["option1"], before + row["option2"]]


TASK = Cloze(
    name="winogrande",
    source=Source("winogrande", hub="allenai/winogrande", config="winogrande_xl"),
    choices=_filled,
    ending=lambda row: row["sentence"][row["sentence"].index("_") + 1 :].strip(),
    answer=lambda row: int(row["answer"]) - 1,
)
