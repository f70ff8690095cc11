"""Strings of the multiple-choice tasks, written out by hand."""

import pytest

from moeq.tasks.registry import find_task
from moeq.tasks.task import LastWord, MultipleChoice, Outcome
from tests.tasks.catalog.examples import ROWS

# Task and row; context, continuations and index of the right one.
CASES = {
    ("arc_easy", 0): ("Question: What melts ice?\nAnswer:", [" heat", " cold", " wind", " sand"], 0),
    ("arc_easy", 1): ("Question: Which is 3?\nAnswer:", [" one", " two", " three"], 2),
    ("arc_challenge", 2): ("Question: Two\nlines?\nAnswer:", [" a b", " c", " it's", ' "d"'], 3),
    ("boolq", 0): ("Rain -- Rain is water.\nQuestion: is rain wet?\nAnswer:", [" no", " yes"], 1),
    ("boolq", 1): ("Sand -- Sand is dry.\nMostly.\nQuestion: is sand wet?\nAnswer:", [" no", " yes"], 0),
    ("copa", 0): ("The glass fell therefore", ["  it broke.", "  i sang."], 0),
    ("copa", 1): ("He ran because", ["  he sat.", "  he was late."], 1),
    ("hellaswag", 0): (
        "Making tea: A woman boils water. She",
        [" pours it.", "  Sings loud.. End", " sleeps.", " runs."],
        0,
    ),
    ("hellaswag", 1): (
        "Health: How to rest. Lie down. Sleep.",
        [" Rest.", " Go.", " Eat.", " Read."],
        3,
    ),
    ("mathqa", 0): (
        "Question: what is 2 + 3 ?\nAnswer:",
        [" 5", " 27.5", " rs . 1", " 2 : 1", " none"],
        0,
    ),
    ("mathqa", 1): ("Question: half of 8 ?\nAnswer:", [" 1", " 2", " 3", " 5", " 4"], 4),
    ("mmlu", 0): ("Who signed?\nA.  W0\nB.  W1\nC.  W2\nD.  W3\nAnswer:", [" A", " B", " C", " D"], 1),
    ("mmlu_moequant", 0): (" Who signed? \nA.  W0\nB.  W1\nC.  W2\nD.  W3\nAnswer:", ["A", "B", "C", "D"], 1),
    ("openbookqa", 0): ("A fire needs", [" heat", " cold", " wind", " sand"], 1),
    ("openbookqa", 1): ("Plants", [" a b", " c", " it's", ' "d"'], 2),
    ("piqa", 0): ("Question: Open a jar\nAnswer:", [" twist it", ' tap it\'s "lid"'], 1),
    ("piqa", 1): ("Question: Dry\nsocks\nAnswer:", [" air", " water"], 0),
    ("sciq", 0): ("Ice is water. \nQuestion: What is ice?\nAnswer:", [" air", " sand", " fire", " water"], 3),
    ("sciq", 1): ("\nQuestion: Why?\nAnswer:", [" a", " b", " c", " d"], 3),
}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_all_choices_continue_one_context(name: str, index: int) -> None:
    task = find_task(name)
    assert isinstance(task, MultipleChoice)
    row = ROWS[name.removesuffix("_moequant")][index]
    context, continuations, answer = CASES[name, index]
    assert task.pairs(row) == [(context, continuation) for continuation in continuations]
    assert task.answer(row) == answer


def test_winogrande_scores_the_rest_of_the_sentence_after_each_name() -> None:
    task = find_task("winogrande")
    assert isinstance(task, MultipleChoice)
    first, second = ROWS["winogrande"]
    assert task.pairs(first, "Shots. ") == [
        ("Shots. Ann thanked Eve because Ann", " had helped ."),
        ("Shots. Ann thanked Eve because Eve", " had helped ."),
    ]
    assert task.answer(first) == 1
    assert task.pairs(second) == [
        ("The cup beat the mug as cup", " was new."),
        ("The cup beat the mug as mug", " was new."),
    ]
    assert task.answer(second) == 0


def test_boolq_reads_the_original_fields_too() -> None:
    task = find_task("boolq")
    assert isinstance(task, MultipleChoice)
    row = {"question": "is rain wet", "title": "Rain", "passage": "Rain is water.", "answer": True}
    assert task.pairs(row) == task.pairs(ROWS["boolq"][0])
    assert task.answer(row) == 1
    assert task.answer({**row, "answer": False}) == 0


def test_an_empty_choice_never_wins_by_length() -> None:
    task = find_task("hellaswag")
    assert isinstance(task, MultipleChoice)
    row = {**ROWS["hellaswag"][0], "endings": ["[step]", "runs."], "label": "1"}
    assert task.pairs(row)[0][1] == " "
    assert task.score(row, [Outcome(-1.0, False), Outcome(-9.0, False)]) == {"acc": (0.0, 1.0), "acc_norm": (1.0, 1.0)}


def test_lambada_asks_for_what_follows_the_last_blank() -> None:
    task = find_task("lambada_openai")
    assert isinstance(task, LastWord)
    first, second = ROWS["lambada_openai"]
    assert task.pairs(first) == [("He took the red", " hat")]
    assert task.pairs(second) == [('A dog.\n\n"Sit,"', " I\n\nsaid")]


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "mathqa", "openbookqa", "piqa", "sciq"])
def test_both_accuracies_are_reported_where_choices_differ_in_length(name: str) -> None:
    assert list(find_task(name).metrics) == ["acc", "acc_norm"]


@pytest.mark.parametrize("name", ["boolq", "copa", "mmlu", "winogrande"])
def test_one_accuracy_is_reported_where_the_harness_reports_one(name: str) -> None:
    assert list(find_task(name).metrics) == ["acc"]


@pytest.mark.parametrize(
    ("subject", "category"),
    [
        ("anatomy", "stem"),
        ("us_foreign_policy", "social_sciences"),
        ("prehistory", "humanities"),
        ("virology", "other"),
    ],
)
def test_a_row_of_mmlu_counts_for_its_category_and_its_subject(subject: str, category: str) -> None:
    assert find_task("mmlu").groups({"subject": subject}) == (category, subject)
