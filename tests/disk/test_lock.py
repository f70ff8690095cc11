"""One holder of a folder at a time, and no trace of those before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeq.disk.lock import LOCK, FolderLock

HOLD = "import sys, time; from pathlib import Path; from moeq.disk.lock import FolderLock; "
HOLD += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_holder_is_refused_by_the_name_of_the_first_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "deep/run"
    with FolderLock(folder):
        with pytest.raises(
            ValueError, match=rf"run is in use by another run \(process {os.getpid()} on .*; wait for its"
        ):
            FolderLock(folder)
        assert (folder / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    FolderLock(folder).release()


def test_what_the_folder_holds_stays(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    FolderLock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_lock_of_a_killed_process_vanishes(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another run \(process {holder.pid} on "):
            FolderLock(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (tmp_path / LOCK).is_file()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_system_has_no_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = FolderLock(tmp_path)
    assert lock.unknown == "No locks available"
    lock.release()


def test_a_folder_that_may_not_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ValueError, match=r"run cannot be written \(Permission denied\); set --trainer.default_root"):
        FolderLock(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
