"""Files appear whole or not at all, on the disk and not only in its cache."""

import json
import os
from pathlib import Path

import pytest
import torch

from moeq.disk.atomic import copy_file, write_csv, write_json, write_tensors, write_text

WRITERS = {
    "json": lambda path: write_json(path, {"a": 1}),
    "csv": lambda path: write_csv(path, [{"a": 1}]),
    "text": lambda path: write_text(path, "a"),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(2)}),
    "copy": lambda path: copy_file(Path(__file__), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_appear_complete_or_not_at_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            WRITERS[kind](tmp_path / "deep/file")
    assert list((tmp_path / "deep").iterdir()) == []
    WRITERS[kind](tmp_path / "deep/file")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    WRITERS[kind](tmp_path / "file")
    assert steps == ["sync", "rename", "sync"]  # the file, its name, its folder


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"file could not be written .*No space left on device.*make room on its disk"):
        WRITERS[kind](tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_this_module_gives_files_their_names() -> None:
    """Records append to their files, folders are renamed whole; everything else is written here."""
    allowed = {"moeq/disk/atomic.py", "moeq/disk/folder.py", "moeq/evaluation/records.py"}
    calls = ("os.replace(", ".write_text(", "save_file(", ".rename(", "shutil.copyfile(")
    for folder in ("moeq", "callbacks", "datamodules"):
        for path in Path(folder).rglob("*.py"):
            source = path.read_text(encoding="utf8")
            if path.as_posix() not in allowed and path.name != "meter.py":
                assert not [call for call in calls if call in source], path


def test_json_and_csv_hold_what_was_given(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"a": [1, None]}
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": "b"}, {"x": 2, "y": "c"}])
    assert (tmp_path / "a.csv").read_text().split() == ["x,y", "1,b", "2,c"]
    write_csv(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()
