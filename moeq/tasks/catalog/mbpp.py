"""MBPP (Austin et al., 2021; CC BY 4.0): a function from a sentence and three tests, which it then has to pass.

As in lm-evaluation-harness, whose three examples are problems 2 to 4 of the ``prompt`` split.
"""

from moeq.tasks.task import Code, DataRow, Source


def _tests(row: DataRow) -> str:
    return "\n".join(row["test_list"][:3])


TASK = Code(
    name="mbpp",
    source=Source("mbpp", hub="google-research-datasets/mbpp", config="full", splits=("test",), shots="prompt[1:4]"),
    num_shots=3,
    prompt=lambda row: (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{_tests(row)}\n[BEGIN]\n"
    ),
    target=lambda row: f"{row['code']}\n[DONE]",
    stop=("[DONE]",),
    max_new_tokens=256,
    program=lambda row, text: f"{text}\n{_tests(row)}",
)
