"""Files to documents, documents to tokens."""

import gzip
import json
from pathlib import Path

import pytest

from moeq.disk.texts import read_documents, token_stream
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


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_of_text_and_of_json_lines_are_read(tmp_path: Path, suffix: str) -> None:
    opener = gzip.open if suffix else open
    with opener(tmp_path / f"a.txt{suffix}", "wt", encoding="utf8") as file:
        file.write("one\n\ntwo")
    with opener(tmp_path / f"a.jsonl{suffix}", "wt", encoding="utf8") as file:
        file.write(json.dumps({"body": "one"}) + "\n\n" + json.dumps({"body": "t\u00e9xt"}) + "\n")
    assert read_documents(tmp_path / f"a.txt{suffix}") == ["one\n\ntwo"]
    assert read_documents(tmp_path / f"a.jsonl{suffix}", "body") == ["one", "t\u00e9xt"]


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.csv", "1,2", None, r"must end in \.txt or \.jsonl"),
        ("a.txt", " \n", None, "is empty"),
        ("a.jsonl", "", None, "is empty"),
        ("a.jsonl", '{"text": "fine"}\n{"text":', None, "line 2 is not JSON"),
        ("a.jsonl", '{"title": "x"}', None, r"line 1 has \['title'\]; it should contain .*question"),
        ("a.jsonl", '{"text": "x"}', "body", r"line 1 has \['text'\]; it should contain .* a field 'body'"),
        ("a.jsonl", "[1]", None, "line 1 has list"),
        ("a.jsonl", '{"text": null}', None, r"line 1: field 'text' is null, not a text; leave such rows out"),
        ("a.jsonl", '{"text": "x"}\n{"text": 17}', None, r"line 2: field 'text' is a int, not a text"),
        ("a.jsonl", '{"question": "x", "answer": 4}', None, r"line 1: field 'answer' is a int, not a text"),
        (
            "a.jsonl",
            '{"text": [{"role": "user", "content": "x"}]}',
            None,
            "is a chat.*for calibration only",
        ),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str, field: str | None, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name, field)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\u00e9".encode("latin1"), r"a\.txt is not UTF-8 \(byte 0xe9\); convert it"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 \(byte 0xff\)"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-12], r"a\.txt\.gz is damaged .*copy it again"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged"),
    ],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_documents_are_followed_by_the_end_of_text_token() -> None:
    tokenizer = tiny_tokenizer()
    ids_T = token_stream(["ab", "c"], tokenizer)
    a, b, c = tokenizer.encode("abc")
    assert ids_T.tolist() == [a, b, 0, c, 0]
