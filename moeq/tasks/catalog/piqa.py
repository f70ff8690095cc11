"""PIQA (Bisk et al., 2020; AFL 3.0): which of two ways reaches a goal in the physical world.

As in lm-evaluation-harness.
"""

from moeq.tasks.task import MultipleChoice, Source

TASK = MultipleChoice(
    name="piqa",
    source=Source("piqa", hub="baber/piqa"),
    context=lambda row: f"Question: {row['goal']}\nAnswer:",
    choices=lambda row: [row["sol1"], row["sol2"]],
    answer=lambda row: int(row["label"]),
)
