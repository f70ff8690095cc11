"""Folders that appear whole or not at all, with a manifest of their files.

A folder is written under a temporary name beside its place and renamed when it is complete; ``moeq_manifest.json``
lists size and SHA-256 of every file, so that a truncated or altered one is named instead of read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeq.disk.atomic import sync
from moeq.disk.tensor_file import stored_tensors

MANIFEST = "moeq_manifest.json"
INDEX = "model.safetensors.index.json"


def check_target(directory: Path | str, *, overwrite: bool = False) -> None:
    """Raise ValueError where ``directory`` is a file, or a folder with content that must not be overwritten."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder to export to")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists and is not empty; choose another folder, or set overwrite to true")


@contextmanager
def atomic_folder(directory: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling folder to write into; rename it to ``directory`` on success, remove it on failure.

    Raises:
        ValueError: See ``check_target``.
    """
    target = Path(directory).absolute()
    partial, previous = (target.with_name(f".{target.name}.{state}") for state in ("partial", "previous"))
    if previous.exists() and not target.exists():  # stopped between the two renames below
        previous.rename(target)
    check_target(target, overwrite=overwrite)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with the size and SHA-256 of every file of the folder but its README, which may be edited."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
    (directory / MANIFEST).write_text(json.dumps({**content, "files": files}, indent=2, sort_keys=True) + "\n")


def check_integrity(directory: Path | str) -> None:
    """Check every file of a checkpoint folder against its manifest, and that its weights can be opened.

    A folder without a manifest (saved by transformers) is checked for missing and truncated files only.

    Raises:
        ValueError: The folder, a file of the manifest or a shard is missing, or a file is truncated or altered.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint")
    if (folder / MANIFEST).is_file():
        for name, expected in _read_json(folder / MANIFEST)["files"].items():
            _check_file(folder / name, expected)
    for path in weight_files(folder):
        # Weights in other files are not opened here; what loads a folder without any says so.
        if path.is_file() or (folder / INDEX).is_file():
            stored_tensors(path)


def weight_files(directory: Path | str) -> list[Path]:
    """Safetensors files of a checkpoint folder: the shards of its index, or the one file."""
    folder = Path(directory)
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_read_json(folder / INDEX)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    remedy = "export or copy the checkpoint again"
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the manifest lists it; {remedy}")
    size = os.path.getsize(path)
    if size != expected["bytes"]:
        raise ValueError(f"{path} has {size} bytes where the manifest says {expected['bytes']}; {remedy}")
    digest = _sha256(path)
    if digest != expected["sha256"]:
        raise ValueError(
            f"{path} has SHA-256 {digest[:12]}... where the manifest says {expected['sha256'][:12]}...: "
            f"its content changed; {remedy}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); export or copy it again") from error
    assert isinstance(content, dict)
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
