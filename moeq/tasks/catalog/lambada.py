"""LAMBADA in OpenAI's form (Paperno et al., 2016; CC BY 4.0): the last word of a passage.

As in lm-evaluation-harness.
"""

from moeq.tasks.task import LastWord, Source

TASK = LastWord(
    name="lambada_openai",
    source=Source("lambada", hub="EleutherAI/lambada_openai", config="default", splits=("test",)),
    context=lambda row: " ".join(row["text"].split(" ")[:-1]),
    target=lambda row: " " + row["text"].split(" ")[-1],
)
