"""Files that appear whole or not at all: the one place that writes them.

A file is written under a temporary name beside its place, forced to the disk and renamed, and so is the renaming: a
killed run leaves no half-written file, a power cut no whole name on an empty one.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` on success and is removed on failure.

    Args:
        path: The file; its folder is made where there is none.
        shared: Several processes may write it at once, each under a name of its own.  Otherwise what a killed process
            left is written over.

    Raises:
        ValueError: The disk is full, or does not take the file for another reason.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp" if shared else f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} could not be written ({error}); make room on its disk or give a folder that may be written, and "
            "start again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write text as UTF-8; see ``whole_file``."""
    with whole_file(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf8")


def write_json(path: Path, data: Any, *, shared: bool = False) -> None:
    """Write JSON; see ``whole_file``."""
    write_text(path, json.dumps(data, indent=1) + "\n", shared=shared)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that share their keys as CSV; nothing where there are no rows.  See ``whole_file``."""
    if not rows:
        return
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, shared: bool = False
) -> None:
    """Write contiguous CPU tensors that share no memory as safetensors; see ``whole_file``."""
    with whole_file(path, shared=shared) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that other processes may be copying to the same place, too; see ``whole_file``."""
    with whole_file(target, shared=True) as temporary:
        shutil.copyfile(source, temporary)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems refuse it for folders, where it is only a precaution.
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
