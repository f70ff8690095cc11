"""GSM8K (Cobbe et al., 2021; MIT): word problems solved step by step; 5 random examples of the train split.

As in lm-evaluation-harness: the strict answer is the number after "####", the flexible one the last number.
"""

import re

from moeq.tasks.task import DataRow, Generation, Source, Values

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _normal(answer: str) -> str:
    """Without thousands separators, dollar signs, the way to the answer and a final full stop."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


def _score(row: DataRow, text: str) -> Values:
    right = _normal(row["answer"])
    strict = STRICT.search(text)
    numbers = FLEXIBLE.findall(text)
    found = {"strict": strict[1] if strict else "", "flexible": numbers[-1] if numbers else ""}
    return {f"exact_match_{name}": (float(_normal(answer) == right), 1.0) for name, answer in found.items()}


TASK = Generation(
    name="gsm8k",
    source=Source("gsm8k", hub="openai/gsm8k", config="main", splits=("test",), shots="train"),
    num_shots=5,
    shot_sampler="random",
    prompt=lambda row: f"Question: {row['question']}\nAnswer:",
    target=lambda row: f" {row['answer']}",
    stop=("Question:", "</s>", "<|im_end|>"),
    max_new_tokens=256,
    score_text=_score,
    metrics={"exact_match_strict": "mean", "exact_match_flexible": "mean"},
)
