"""OpenBookQA main (Mihaylov et al., 2018; Apache-2.0): elementary science questions with four answers.

As in lm-evaluation-harness.  QuantMoE-Bench reports ``acc_norm``; MoEQuant's figures are of the size of ``acc``.
"""

from moeq.tasks.task import MultipleChoice, Source

TASK = MultipleChoice(
    name="openbookqa",
    source=Source("openbookqa", hub="allenai/openbookqa", config="main", splits=("test", "validation")),
    context=lambda row: row["question_stem"],
    choices=lambda row: row["choices"]["text"],
    answer=lambda row: row["choices"]["label"].index(row["answerKey"].lstrip()),
)
