"""HumanEval (Chen et al., 2021; MIT): the body of a function from its head and docstring, run against its tests.

``humaneval`` is lm-evaluation-harness's; ``humaneval_moequant`` stops and indents as MoEQuant's evaluation code does.
"""

from dataclasses import replace

from moeq.tasks.task import Code, DataRow, Source


def _program(row: DataRow, text: str) -> str:
    return f"{row['prompt']}{text}\n{row['test']}\ncheck({row['entry_point']})"


HUMANEVAL = Code(
    name="humaneval",
    source=Source("humaneval", hub="openai/openai_humaneval", splits=("test",)),
    prompt=lambda row: row["prompt"],
    target=lambda row: row["canonical_solution"],
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    max_new_tokens=1024,
    program=_program,
)

MOEQUANT = replace(
    HUMANEVAL,
    name="humaneval_moequant",
    stop=("def ", "\n\n\n", "</s>"),
    max_new_tokens=512,
    program=lambda row, text: _program(row, "    " + text.lstrip()),
)

TASKS = (HUMANEVAL, MOEQUANT)
