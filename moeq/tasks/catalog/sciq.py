"""SciQ (Welbl et al., 2017; CC BY-NC 3.0): science questions below a supporting text; as in lm-evaluation-harness."""

from moeq.tasks.task import MultipleChoice, Source

TASK = MultipleChoice(
    name="sciq",
    source=Source("sciq", hub="allenai/sciq", splits=("test", "validation")),
    context=lambda row: f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:",
    choices=lambda row: [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]],
    answer=lambda row: 3,
)
