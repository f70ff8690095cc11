"""Where continuations end, and which text is left of them."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moeq.decoding.stopping import Stopping, end_of_text_ids
from tests.tiny import END_OF_TEXT, tiny_tokenizer


def ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def first_stop(stopping: Stopping, new: list[int]) -> int | None:
    """Number of tokens after which a continuation has ended."""
    return next((n for n in range(1, len(new) + 1) if stopping.reached(new[:n])), None)


def wordpiece_like() -> PreTrainedTokenizerFast:
    """Whole words with their leading blank, which is lost where a word is decoded first."""
    words = {"<unk>": 0, **{f"\u2581{word}": i for i, word in enumerate(("the", "end", "is", "near"), 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_stop_string_that_spans_tokens_is_found_with_its_last_token() -> None:
    stopping = Stopping(tiny_tokenizer(), ["Question:"], {0})
    new = ids(" 42\nQuestion: what")
    assert first_stop(stopping, new) == len(" 42\nQuestion:")
    assert stopping.text(new) == " 42\n"


def test_a_stop_string_late_in_a_long_text_is_found() -> None:
    stopping = Stopping(tiny_tokenizer(), ["\ndef", "\nclass"], {0})
    assert first_stop(stopping, ids("x" * 300 + "\nclass A")) == 300 + len("\nclass")


def test_the_token_of_the_end_ends_a_text_and_is_not_part_of_it() -> None:
    stopping = Stopping(tiny_tokenizer(), [], {0, 65})
    assert first_stop(stopping, [70, 71, 0, 72]) == 3
    assert first_stop(stopping, [70, 65]) == 2
    assert stopping.text([*ids("yes"), 0]) == "yes"


def test_the_text_of_the_end_stops_too_though_spelled_out() -> None:
    stopping = Stopping(tiny_tokenizer(), [], {0})
    spelled = [i for character in END_OF_TEXT for i in ids(character)]
    assert first_stop(stopping, [*ids("yes"), *spelled]) == len("yes" + END_OF_TEXT)
    assert stopping.text([*ids("yes"), *spelled]) == "yes"


def test_a_character_split_over_tokens_is_searched_whole() -> None:
    stopping = Stopping(tiny_tokenizer(), ["\u20ac"], {0})
    new = ids("5 \u20ac")
    assert len(new) == 5
    assert first_stop(stopping, new) == 5
    assert stopping.text(new) == "5 "
    assert Stopping(tiny_tokenizer(), ["\u20ad"], {0}).text(new) == "5 \u20ac"


def test_a_blank_that_a_decoder_drops_at_the_beginning_is_not_missed() -> None:
    tokenizer = wordpiece_like()
    stopping = Stopping(tokenizer, [" end is"], set())
    new = tokenizer("the near the near the near the near end is near")["input_ids"]
    assert first_stop(stopping, new) == 10
    assert stopping.text(new) == "the near the near the near the near"
    assert first_stop(Stopping(tokenizer, ["end is"], set()), new[8:]) == 2
    assert first_stop(stopping, new[8:]) is None


def test_text_that_only_the_cut_tail_has_stops_nothing() -> None:
    # A tail that begins inside of a character decodes to the replacement sign, which the whole text does not hold.
    stopping = Stopping(tiny_tokenizer(), ["\ufffd"], {0})
    new = ids("\u20ac" * 12)
    assert first_stop(stopping, new) == 1  # half a character is that sign until it is whole
    assert not stopping.reached(new)
    assert stopping.text(new) == "\u20ac" * 12


def test_random_tokens_stop_where_a_search_of_the_whole_text_stops_them(generator: torch.Generator) -> None:
    tokenizer = tiny_tokenizer()
    stop = ["ab", "c\n", "", "aaa"]
    stopping = Stopping(tokenizer, stop, {0})
    letters = [i for character in "abc\n" for i in ids(character)]
    for _ in range(50):
        new = [letters[i] for i in torch.randint(4, (30,), generator=generator).tolist()]
        text = tokenizer.decode(new)
        ends = [text.find(string) + len(string) for string in stop if string and string in text]
        assert first_stop(stopping, new) == min(ends, default=None)


def test_texts_are_cut_as_in_the_harness(generator: torch.Generator) -> None:
    utils = pytest.importorskip("lm_eval.models.utils")
    tokenizer = tiny_tokenizer()
    letters = [i for character in "abcd" for i in ids(character)] + [0]
    for stop in (["ab", "bc"], ["bc", "ab"], ["a"], [], ["", "dd", "cab"]):
        until = utils.handle_stop_sequences(list(stop), eos=tokenizer.eos_token)
        for length in (1, 5, 40):
            new = [letters[i] for i in torch.randint(5, (length,), generator=generator).tolist()]
            text = tokenizer.decode(new, skip_special_tokens=True)
            expected = utils.postprocess_generated_text(text, until, None)
            assert Stopping(tokenizer, stop, {0}).text(new) == expected


@pytest.mark.parametrize(("ids_of_model", "expected"), [(None, {0}), (7, {0, 7}), ([7, 9], {0, 7, 9})])
def test_the_ends_of_the_model_and_of_the_tokenizer_count(ids_of_model: object, expected: set[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids_of_model))
    assert end_of_text_ids(model, tiny_tokenizer()) == expected
    assert end_of_text_ids(SimpleNamespace(), tiny_tokenizer()) == {0}
