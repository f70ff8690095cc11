"""Parsing of arithmetic lines and answers, and greedy generation with left padding."""

import pytest
import torch

from moeq.tasks.arithmetic import build_problems, greedy_continuations, left_pad, parse_answer, parse_line
from tests.tiny import tiny_model

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


def test_prompts_are_padded_on_the_left() -> None:
    prompt_ids_BP, attention_mask_BP = left_pad([[5, 6, 7], [8]], pad_token_id=0)
    assert prompt_ids_BP.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask_BP.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_left_padding_does_not_change_what_is_generated(family: str, generator: torch.Generator) -> None:
    model = tiny_model(family)
    prompts = [torch.randint(1, 264, (n,), generator=generator).tolist() for n in (3, 11, 7)]
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    together, logits_BNV = greedy_continuations(model, *left_pad(prompts, 0), **options)
    for row, prompt in enumerate(prompts):
        alone, alone_logits_BNV = greedy_continuations(model, *left_pad([prompt], 0), **options)
        length = alone.shape[1]
        assert together[row, :length].tolist() == alone[0].tolist()
        torch.testing.assert_close(logits_BNV[row, :length], alone_logits_BNV[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_is_greedy() -> None:
    model = tiny_model("qwen2_moe")
    ids = [5, 17, 99]
    new_ids_BN, _ = greedy_continuations(model, *left_pad([ids], 0), max_new_tokens=4, pad_token_id=0)
    for new_id in new_ids_BN[0].tolist():
        assert new_id == int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(new_id)
