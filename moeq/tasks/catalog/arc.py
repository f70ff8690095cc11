"""ARC (Clark et al., 2018; CC BY-SA 4.0): science questions of school examinations; as in lm-evaluation-harness."""

from moeq.tasks.task import MultipleChoice, Source


def _task(name: str, config: str) -> MultipleChoice:
    return MultipleChoice(
        name=name,
        source=Source(config.lower(), hub="allenai/ai2_arc", config=config, splits=("test", "validation")),
        context=lambda row: f"Question: {row['question']}\nAnswer:",
        choices=lambda row: row["choices"]["text"],
        answer=lambda row: row["choices"]["label"].index(row["answerKey"]),
    )


TASKS = (_task("arc_easy", "ARC-Easy"), _task("arc_challenge", "ARC-Challenge"))
