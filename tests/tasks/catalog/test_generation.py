"""Prompts, answers and programs of the tasks that generate, written out by hand."""

import pytest

from moeq.tasks.registry import find_task
from moeq.tasks.task import Code, Generation
from tests.tasks.catalog.examples import ROWS, SHOTS


def generation(name: str) -> Generation:
    task = find_task(name)
    assert isinstance(task, Generation)
    return task


def test_an_example_of_gsm8k_is_the_question_and_its_solution() -> None:
    task = generation("gsm8k")
    assert task.prompt(ROWS["gsm8k"][1]) == "Question: And 5 - 7?\nAnswer:"
    assert task.shot(ROWS["gsm8k"][1]) == "Question: And 5 - 7?\nAnswer: It is -2.\n#### -2"
    assert task.stop == ("Question:", "</s>", "<|im_end|>")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 1200 + 34 = 1234.\n#### 1,234", 1, 1),
        (" It is $1,234.", 0, 1),
        ("#### 1234\nThen 5", 1, 0),
        ("#### 12345", 0, 0),
        ("none", 0, 0),
    ],
)
def test_gsm8k_has_a_strict_and_a_flexible_answer(text: str, strict: int, flexible: int) -> None:
    values = generation("gsm8k").score_text(ROWS["gsm8k"][0], text)
    assert values == {"exact_match_strict": (strict, 1.0), "exact_match_flexible": (flexible, 1.0)}


def test_humaneval_runs_prompt_completion_and_tests() -> None:
    task = generation("humaneval")
    assert isinstance(task, Code)
    row = ROWS["humaneval"][0]
    assert task.prompt(row) == 'def add(a, b):\n    """Sum."""\n'
    program = task.program(row, task.target(row))
    assert program == (
        'def add(a, b):\n    """Sum."""\n    return a + b\n\n'
        "\ndef check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)"
    )
    exec(program, {})
    with pytest.raises(AssertionError):
        exec(task.program(row, "    return a - b\n"), {})


def test_moequant_s_humaneval_indents_the_completion_anew() -> None:
    task = generation("humaneval_moequant")
    assert isinstance(task, Code)
    row = ROWS["humaneval"][1]
    assert task.program(row, "\n  return 1").startswith("def one():\n    return 1\n")
    assert task.stop == ("def ", "\n\n\n", "</s>")
    assert task.max_new_tokens == 512


def test_mbpp_shows_three_tests_and_runs_them() -> None:
    task = generation("mbpp")
    assert isinstance(task, Code)
    row = ROWS["mbpp"][0]
    tests = "assert inc(0) == 1\nassert inc(1) == 2\nassert inc(2) == 3"
    assert task.prompt(row) == (
        "You are an expert Python programmer, and here is your task: Write inc. Your code should pass these tests:\n\n"
        f"{tests}\n[BEGIN]\n"
    )
    assert task.shot(row) == f"{task.prompt(row)}def inc(n):\r\n  return n + 1\n[DONE]"
    assert task.program(row, "def inc(n): return n + 1\n") == f"def inc(n): return n + 1\n\n{tests}"
    exec(task.program(row, row["code"]), {})


def test_a_program_of_mbpp_fails_where_one_test_does() -> None:
    task = generation("mbpp")
    assert isinstance(task, Code)
    with pytest.raises(AssertionError):
        exec(task.program(ROWS["mbpp"][0], "inc = lambda n: 1 + max(n, 1)"), {})


def test_sums_show_the_four_lines_before_each_problem() -> None:
    task = generation("sums")
    documents = task.prepare(ROWS["sums"])
    # Of the nine lines two are blank.
    assert len(documents) == 7
    assert task.prompt(documents[5]) == "0 + 1 = 1\n0 + 2 = 2\n1 + 0 = 1\n1 + 1 = 2\n2 + 0 ="
    assert task.target(documents[5]) == " 2\n"
    assert task.prompt(documents[0]) == "1 + 0 = 1\n1 + 1 = 2\n2 + 0 = 2\n2 + 2 = 4\n0 + 0 ="
    assert task.stop == ("\n",)


@pytest.mark.parametrize(("text", "right"), [(" 2", 1), ("2", 1), (" 3", 0), (" 2 apples", 0), ("", 0)])
def test_a_sum_is_right_where_the_line_is_the_number(text: str, right: int) -> None:
    assert generation("sums").score_text({"answer": "2"}, text) == {"exact_match": (right, 1.0)}


def test_no_sum_states_its_own_answer() -> None:
    lines = ["1 + 1 = 2", "2 + 2 = 4", "1 + 1 = 2", "3 + 3 = 6", "4 + 4 = 8", "5 + 5 = 10", "1 + 1 = 2"]
    for document in generation("sums").prepare([{"text": f"{line}\n"} for line in lines]):
        *shots, question = document["prompt"].split("\n")
        assert len(shots) == 4
        assert not any(shot.startswith(question) for shot in shots)


def test_the_examples_of_mbpp_are_problems_2_to_4() -> None:
    assert generation("mbpp").source.shots == "prompt[1:4]"
    assert [row["task_id"] for row in SHOTS["mbpp"][1:4]] == [2, 3, 4]
