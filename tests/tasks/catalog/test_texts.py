"""Pages, detokenization and protocols of the perplexity tasks."""

import math
import re
from random import Random

import pytest

from moeq.tasks.pages import detokenized, pages
from moeq.tasks.registry import find_task
from moeq.tasks.task import Rolling, Windows
from tests.tasks.catalog.examples import ROWS


def rolling(name: str) -> Rolling:
    task = find_task(name)
    assert isinstance(task, Rolling)
    return task


def test_pages_begin_at_titles_and_the_last_one_has_the_final_newline() -> None:
    first, second = rolling("wikitext").prepare(ROWS["wikitext"])
    assert first["page"] == (
        ' = Lake Blue = \n \n Lake Blue is 3 @,@ 000 @.@ 5 m deep , and " cold " . \n = = Fish = = \n'
        " It has pike ; the lake 's pikes ( big ) are old ! "
    )
    assert second["page"] == " = Hill = Side = \n N hills : see [ 1 ] \n"


def test_pages_are_those_of_the_whole_text_cut_before_its_titles() -> None:
    random = Random(0)
    kinds = [" = A b = ", " = = C = = ", " = = = D = = = ", " = E = = = ", " text , = here = ", " "]
    for _ in range(50):
        lines = random.choices(kinds, k=12)
        text = "".join(f"{line}\n" for line in lines)
        expected = re.split(r"\n(?= = A b = \n)", text)
        blank_start = not expected[0].strip() and len(expected) > 1
        found = pages([{"text": f"{line}\n" if line.strip() else ""} for line in lines])
        assert [row["page"] for row in found] == expected[blank_start:]


def test_pages_are_detokenized_and_counted_as_they_were() -> None:
    task = rolling("wikitext")
    first, second = task.prepare(ROWS["wikitext"])
    assert task.text(first) == (
        ' = Lake Blue =\n\nLake Blue is 3,000.5 m deep, and "cold".\n== Fish ==\n'
        "It has pike; the lake's pikes (big) are old! "
    )
    assert task.text(second) == " = Hill = Side =\nN hills: see [1]\n"
    values = task.score(second, -20.0)
    # "", =, Hill, =, Side, =, N, hills, :, see, [, 1, ], "": blanks at either end make empty words.
    assert values["word_perplexity"] == (20.0, 14.0)
    assert values["byte_perplexity"] == values["bits_per_byte"] == (20.0, float(len(second["page"])))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dogs ' tails", "dogs' tails"),
        ("a @-@ b", "a-b"),
        ("{ x }", "{x}"),
        ("see ' this '", "see 'this'"),
        ("5 \u00b0 C", "5\u00b0C"),
        ("a N b", "a 1 b"),
        ("it 's", "it's"),
        ("= = = = H = = = =", "==== H ===="),
    ],
)
def test_each_token_apart_is_joined_again(text: str, expected: str) -> None:
    assert detokenized(text) == expected


def test_c4_is_scored_as_detokenized_and_counted_as_stored() -> None:
    task = rolling("c4")
    assert [task.text(row) for row in task.prepare(ROWS["c4"])] == ["Hello, world .\nIt's me .", " Blue sky"]
    assert task.score(ROWS["c4"][1], -math.log(2))["word_perplexity"] == (math.log(2), 3.0)


@pytest.mark.parametrize(("name", "join", "windows"), [("wikitext2", "\n\n", None), ("c4_windows", None, 256)])
def test_the_papers_windows_have_2048_tokens_and_the_tokenizer_s_own(name: str, join: str, windows: int) -> None:
    task = find_task(name)
    assert isinstance(task, Windows)
    assert (task.join, task.random_windows, task.seed) == (join, windows, 0)
    assert (task.length, task.special_tokens) == (2048, True)
    assert task.text(ROWS["c4"][0]) == "Hello , world .\nIt 's me ."
