"""Parsing of arithmetic lines and answers."""

import pytest

from moeq.tasks.arithmetic import build_problems, parse_answer, parse_line

LINES = [f"{a} + {b} = {a + b}" for a in range(5) for b in range(4)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("37 + 58 = 95", ("37 + 58 =", "95")), ("3 - 5 = -2\n", ("3 - 5 =", "-2")), ("7 * 8 = 56", ("7 * 8 =", "56"))],
)
def test_a_line_is_split_after_the_equals_sign(line: str, expected: tuple[str, str]) -> None:
    assert parse_line(line) == expected


@pytest.mark.parametrize("line", ["37 + 58", "37 + 58 = ", "a + b = c", "1 + 2 = 3 = 3"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="must look like '37 \\+ 58 = 95'"):
        parse_line(line)


@pytest.mark.parametrize(
    ("continuation", "answer"),
    [
        (" 95\n1 + 1 = 2", "95"),
        ("95", "95"),
        (" -4\n", "-4"),
        ("\n95", ""),
        (" 95 apples\n", ""),
        ("9 5\n", ""),
        ("", ""),
    ],
)
def test_the_answer_is_the_integer_before_the_newline_and_nothing_else(continuation: str, answer: str) -> None:
    assert parse_answer(continuation) == answer


def test_problems_are_spread_over_the_file_and_follow_other_lines() -> None:
    problems = build_problems(LINES, num_problems=5, num_shots=2)
    assert [problem.answer for problem in problems] == ["0", "1", "2", "3", "4"]
    assert problems[1].prompt == "0 + 2 = 2\n0 + 3 = 3\n1 + 0 ="
    assert problems[0].prompt == "4 + 2 = 6\n4 + 3 = 7\n0 + 0 ="


def test_a_problem_is_never_answered_by_its_own_shots() -> None:
    lines = ["1 + 1 = 2", "2 + 2 = 4", "1 + 1 = 2", "1 + 1 = 2"]
    problem = build_problems(lines, num_problems=1, num_shots=1)[0]
    assert problem.prompt == "2 + 2 = 4\n1 + 1 ="


def test_too_few_lines_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="20 lines, fewer than the 21 needed"):
        build_problems(LINES, num_problems=21, num_shots=0)
    with pytest.raises(ValueError, match="20 lines, fewer than the 31 needed"):
        build_problems(LINES, num_problems=1, num_shots=30)
