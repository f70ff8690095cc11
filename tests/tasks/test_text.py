"""Files to documents, documents to tokens, tokens to windows."""

import json
from pathlib import Path

import pytest
import torch

from moeq.tasks.text import read_documents, spread_windows, token_stream
from tests.tiny import tiny_tokenizer


def test_a_text_file_is_one_document_and_json_lines_are_one_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    rows = [{"text": "first", "path": "p"}, {"question": "2+2?", "answer": "4"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read_documents(tmp_path / "b.jsonl") == ["first", "Question: 2+2?\nAnswer: 4"]


def test_a_missing_file_is_named_with_its_folder_and_contents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file c.jsonl in folder .*; it should contain one JSON object per line"):
        read_documents(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "1,2", "must end in one of"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "fine"}\n{"text":', "line 2 is not JSON"),
        ("a.jsonl", '{"title": "x"}', r"line 1 has \['title'\]"),
        ("a.jsonl", "[1]", "line 1 has list"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_documents_are_followed_by_the_end_of_text_token() -> None:
    tokenizer = tiny_tokenizer()
    ids_T = token_stream(["ab", "c"], tokenizer)
    a, b, c = tokenizer.encode("abc")
    assert ids_T.tolist() == [a, b, 0, c, 0]


def test_windows_are_consecutive_and_the_rest_is_dropped() -> None:
    windows_NL = spread_windows(torch.arange(11), 3, None)
    assert windows_NL.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_fewer_windows_are_spread_evenly_from_the_first() -> None:
    windows_NL = spread_windows(torch.arange(100), 2, 4)
    assert windows_NL[:, 0].tolist() == [0, 24, 50, 74]


def test_a_short_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 5 tokens, fewer than one window of 8"):
        spread_windows(torch.arange(5), 8, None)
    with pytest.raises(ValueError, match=r"num_windows \(4\) exceeds the 3 windows"):
        spread_windows(torch.arange(25), 8, 4)
