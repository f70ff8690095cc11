"""Few-shot texts: which examples a document gets."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from moeq.tasks.prompts import shot_texts
from moeq.tasks.registry import find_task
from moeq.tasks.rows import Rows
from moeq.tasks.task import Generation, Source
from tests.tasks.catalog.examples import ROWS, SHOTS

TASK = Generation(
    name="letters",
    source=Source("letters", hub=None, splits=("test",), shots="train"),
    metrics={},
    num_shots=2,
    prompt=lambda row: row["q"] + " ",
    target=lambda row: row["a"],
    stop=(),
    max_new_tokens=1,
    score_text=lambda row, text: {},
)
TRAIN = [{"q": str(number), "a": chr(97 + number)} for number in range(10)]
TEST = [{"q": f"t{number}", "a": "?"} for number in range(7)]


def data(shots: list[Any], split: str = "test") -> Rows:
    return Rows(TEST, shots, split, "", "")


def test_the_first_rows_are_everyones_examples() -> None:
    assert shot_texts(TASK, data(TRAIN), TEST) == ["0 a\n\n1 b\n\n"] * 7


def test_without_examples_the_description_is_all() -> None:
    task = replace(TASK, num_shots=0, description=lambda row: f"About {row['q']}.")
    assert shot_texts(task, data([]), TEST[:2]) == ["About t0.", "About t1."]
    assert shot_texts(replace(TASK, num_shots=0), data([]), TEST[:2]) == ["", ""]


def test_random_examples_are_drawn_for_one_document_after_another() -> None:
    task = replace(TASK, shot_sampler="random")
    random = Random(1234)
    expected = ["".join(f"{row['q']} {row['a']}\n\n" for row in random.sample(TRAIN, 2)) for _ in TEST]
    assert len(set(expected)) > 3
    assert shot_texts(task, data(TRAIN), TEST) == expected
    assert shot_texts(task, data(TRAIN), TEST, [5, 0, 2]) == [expected[i] for i in (5, 0, 2)]


@pytest.mark.parametrize("sampler", ["first", "random"])
def test_examples_are_of_the_document_s_kind(sampler: Any) -> None:
    def is_digit(row: Any) -> bool:
        return row["q"].isdigit()

    letters = [{"q": letter, "a": letter} for letter in "xyz"]
    task = replace(TASK, shot_sampler=sampler, shots_like=is_digit)
    documents = [TEST[0], {"q": "5", "a": "?"}, TEST[1]]
    texts = shot_texts(task, data([TRAIN[0], letters[0], TRAIN[1], *letters[1:], *TRAIN[2:]]), documents)
    # Each kind has a generator of its own, as if it were a task of its own.
    alone = shot_texts(replace(task, shots_like=lambda row: None), data(letters), TEST[:2])
    assert [texts[0], texts[2]] == alone
    assert texts[1] == shot_texts(replace(task, shots_like=lambda row: None), data(TRAIN), TEST[:1])[0]


@pytest.mark.parametrize("sampler", ["first", "random"])
def test_a_document_is_never_its_own_example(sampler: Any) -> None:
    task = replace(TASK, source=replace(TASK.source, shots="test"), shot_sampler=sampler)
    # The first row is there three times: draws of it have to be replaced.
    documents = [*TEST[:3], TEST[0], TEST[0]]
    for _ in range(20):
        for document, text in zip(documents, shot_texts(task, data(documents), documents), strict=True):
            assert text.count("\n\n") == 2
            assert f"{document['q']} " not in text


def test_too_few_examples_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="letters shows 2 examples, but split train has 1 rows; complete the file"):
        shot_texts(TASK, data(TRAIN[:1]), TEST)
    kinds: Callable[[Any], str] = lambda row: "kind"  # noqa: E731
    with pytest.raises(ValueError, match="has 0 rows like 'kind'"):
        shot_texts(replace(TASK, shots_like=kinds), data([]), TEST)


def test_windows_take_no_examples() -> None:
    task = replace(find_task("wikitext2"), num_shots=1)
    with pytest.raises(ValueError, match=r"wikitext2 \(Windows\) takes no examples; set num_shots to 0"):
        shot_texts(task, data([{"text": "a"}]), TEST)


def test_mmlu_shows_five_questions_of_the_subject_below_its_name() -> None:
    task = find_task("mmlu")
    text = shot_texts(task, Rows([], SHOTS["mmlu"], "test", "", ""), ROWS["mmlu"])[1]
    assert text.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "a0?\nA. a00\nB. a01\nC. a02\nD. a03\nAnswer: A\n\na1?\n"
    )
    assert text.endswith("a4?\nA. a40\nB. a41\nC. a42\nD. a43\nAnswer: A\n\n")


def test_moequant_s_mmlu_has_two_blanks_before_the_subject_and_one_before_the_letters_of_examples() -> None:
    task = find_task("mmlu_moequant")
    text = shot_texts(task, Rows([], SHOTS["mmlu"], "test", "", ""), ROWS["mmlu"])[0]
    assert text.startswith("The following are multiple choice questions (with answers) about  us foreign policy.\n\n")
    assert text.endswith("Answer: A\n\n")
