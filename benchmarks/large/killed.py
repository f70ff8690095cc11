"""Commands that are killed at a moment, what they had done by then, and whether two run folders hold the same bytes."""

import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq.disk.folder import MANIFEST

UNFINISHED = "export.unfinished"  # of callbacks/export.py
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["moeq.cli", "moeq.checkpoint.stream", "transformers", "lightning.pytorch"])
# Of a run folder: what a fit is for.  Others hold times (manifest.json, memory.csv) or a process id.
FOLDERS = ("blocks", "export", "dense")
FILES = ("errors.csv", "fallbacks.json", "allocation.json")


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        seconds: Until then.
        phase: What its run folder held when it was killed, in words; None where it ended by itself.
    """

    seconds: float
    phase: str | None


def run_killed(arguments: Sequence[str], after: float | None = None) -> Ended:
    """Run ``main.py`` in a fork with one thread, and kill it after some seconds (None: never).

    Args:
        arguments: Of the command; the last one is the run folder.
        after: Seconds.  A command that has ended by then is not killed.

    Raises:
        ValueError: It failed.
    """
    folder = Path(arguments[-1])
    log = folder.with_suffix(".log")
    start = time.perf_counter()
    process = SERVER.Process(target=_main, args=(list(arguments), log))
    process.start()
    process.join(after)
    killed = process.exitcode is None
    if killed:
        process.kill()
        process.join()
    seconds = time.perf_counter() - start
    if process.exitcode and not killed:
        raise ValueError(f"the command ended with {process.exitcode}:\n{log.read_text(encoding='utf8')[-2000:]}")
    return Ended(seconds, phase_of(folder) if killed else None)


def _main(arguments: list[str], log: Path) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["main.py", *arguments]
    runpy.run_path("main.py", run_name="__main__")


def has_ended(folder: Path) -> bool:
    """Whether a run is complete: its command would be refused, as there is nothing to continue."""
    return (folder / "manifest.json").is_file() and not (folder / UNFINISHED).exists()


def phase_of(folder: Path) -> str:
    """How far a killed run had come, from what it left."""
    num_blocks = len(list((folder / "blocks").glob("block_*.safetensors")))
    if (folder / "manifest.json").is_file():
        return "all was written"
    if (folder / "verification.json").is_file():
        return "exports were verified"
    if not (folder / UNFINISHED).is_file():
        return f"{num_blocks} blocks"
    finished = [name for name in ("export", "dense") if (folder / name).is_dir()]
    return f"{num_blocks} blocks, exporting{''.join(f', {name}/ written' for name in finished)}"


def differing_files(one: Path, other: Path) -> list[str]:
    """Files of two run folders that are not the same, or are in one of them only."""
    names = {name for folder in (one, other) for name in _files(folder)}
    return sorted(name for name in names if _content(one / name) != _content(other / name))


def _files(folder: Path) -> list[str]:
    listed = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in listed] + list(FILES)


def _content(path: Path) -> Any:
    """Bytes of a file; JSON of an export as values, without times."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix != ".json" or path.parent.name not in FOLDERS:
        return content
    values = without_seconds(json.loads(content))
    if path.name == MANIFEST:  # the configuration holds seconds, so its size and checksum follow them
        values["files"].pop("config.json", None)
    return values


def without_seconds(value: Any) -> Any:
    """JSON values without those that are named ``seconds``."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value
