"""Rows of files and of the hub, and what is said where there are none."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moeq.tasks.rows import load_rows, read_file, split_part
from moeq.tasks.task import Source

ROWS = [{"text": "caf\u00e9\u2028 next"}, {"text": "b", "number": 2}]


def write(path: Path, text: str) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    path.write_bytes(stored)
    return stored


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz"])
def test_json_lines_are_rows_and_the_hash_is_that_of_the_file(tmp_path: Path, name: str) -> None:
    stored = write(tmp_path / "set" / name, json_lines(ROWS))
    loaded = load_rows(Source("set", hub="a/b", splits=("test", "validation")), tmp_path)
    assert loaded.rows == ROWS
    assert (loaded.split, loaded.origin) == ("test", str(tmp_path / "set" / name))
    assert loaded.sha256 == hashlib.sha256(stored).hexdigest()
    assert (loaded.shots, loaded.shots_sha256) == ([], "")


@pytest.mark.parametrize("name", ["test.txt", "test.txt.gz"])
def test_lines_of_text_are_rows_with_their_newline_and_blank_ones_are_empty(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, " \n = A = \n\n text\u2028more \r\n last")
    rows = load_rows(Source(".", hub=None, splits=("test",)), tmp_path).rows
    assert [row["text"] for row in rows] == ["", " = A = \n", "", " text\u2028more \n", " last\n"]


def test_the_first_split_that_exists_is_read(tmp_path: Path) -> None:
    write(tmp_path / "set" / "validation.jsonl", json_lines(ROWS))
    assert load_rows(Source("set", hub=None, splits=("test", "validation")), tmp_path).split == "validation"
    write(tmp_path / "set" / "test.jsonl", json_lines(ROWS[:1]))
    assert load_rows(Source("set", hub=None, splits=("test", "validation")), tmp_path).split == "test"


def test_examples_may_be_a_part_of_their_split(tmp_path: Path) -> None:
    write(tmp_path / "set" / "test.jsonl", json_lines(ROWS))
    stored = write(tmp_path / "set" / "prompt.jsonl", json_lines([{"n": n} for n in range(6)]))
    loaded = load_rows(Source("set", hub=None, splits=("test",), shots="prompt[1:4]"), tmp_path)
    assert loaded.shots == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert loaded.shots_sha256 == hashlib.sha256(stored).hexdigest()


def test_a_part_of_a_split_may_be_open() -> None:
    assert split_part("train") == ("train", slice(None, None))
    assert split_part("train[:8]") == ("train", slice(None, 8))
    with pytest.raises(ValueError, match="'train\\[8\\]' must be a name or a part such as"):
        split_part("train[8]")


def test_a_missing_file_is_named_with_its_folder_what_is_there_and_what_to_download(tmp_path: Path) -> None:
    source = Source("set", hub="owner/set", config="main", splits=("test", "validation"))
    with pytest.raises(
        ValueError, match=r"no file test.jsonl or validation.jsonl .* in folder .*set, which does not ex"
    ):
        load_rows(source, tmp_path)
    write(tmp_path / "set" / "train.jsonl", json_lines(ROWS))
    with pytest.raises(
        ValueError,
        match=r"which has train.jsonl; download split test or validation of the data set owner/set "
        r"\(configuration main\) there as JSON lines, or leave data_dir out",
    ):
        load_rows(source, tmp_path)


def test_a_missing_split_of_examples_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set" / "test.jsonl", json_lines(ROWS))
    with pytest.raises(ValueError, match=r"no file dev.jsonl .* download split dev of the data set owner/set there"):
        load_rows(Source("set", hub="owner/set", splits=("test",), shots="dev"), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("test.jsonl", "[1, 2]\n", "line 1 is a list; each line must be a JSON object"),
        ("test.jsonl", "\n\n", "is empty; it should contain one JSON object per row"),
        ("test.txt", "", "is empty; it should contain one line per row"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "stored"), [("test.txt", b"\xff\xfe"), ("test.jsonl.gz", b"no gzip"), ("a.txt.gz", b"")]
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, stored: bytes) -> None:
    (tmp_path / name).write_bytes(stored)
    with pytest.raises(ValueError, match=r"cannot be read as UTF-8 text|is empty"):
        read_file(tmp_path / name)


def test_the_hub_is_asked_for_id_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, **options: Any) -> list[dict[str, Any]]:
        calls.append((path, name, split, options))
        if split == "test":
            raise ValueError("Unknown split")
        return ROWS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = Source("set", hub="owner/set", config="main", splits=("test", "validation"), shots="train[0:1]")
    loaded = load_rows(source, None)
    assert [call[:3] for call in calls] == [("owner/set", "main", split) for split in ("test", "validation", "train")]
    assert (loaded.rows, loaded.shots) == (ROWS, ROWS[:1])
    assert (loaded.split, loaded.origin) == ("validation", "owner/set main validation")
    assert loaded.sha256 == loaded.shots_sha256
    load_rows(Source("set", hub="owner/set", hub_file="en/first.json.gz"), None)
    assert calls[-1][3] == {"data_files": {"validation": "en/first.json.gz"}, "verification_mode": "no_checks"}


def test_without_hub_and_folder_the_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"\(\./sums\) has no copy on the hub; give data_dir"):
        load_rows(Source(".", hub=None, splits=("sums",)), None)

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"owner/set could not be loaded .*no network.* a folder with set/validation.j"
    ):
        load_rows(Source("set", hub="owner/set"), None)
