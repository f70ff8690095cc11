"""A command under a hard limit of memory, and the most that it took.

The limit is one of the address space (``ulimit -v``), the strictest that needs no rights: what is resident is a part of
it, beside code of libraries, reserves of the allocator and maps of files that were not read yet.  A process that asks
for more gets an error, whatever the system could still give.  Every process that a command starts has the same limit
for itself; a fit on one rank starts none.

The peak is read from ``VmHWM``, which the kernel keeps.  A fit resets it between passes to measure each of them, so it
is sampled while the command runs, and a rise in the last interval before a reset may be missed.
"""

import os
import re
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

INTERVAL = 0.05
GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes of a process.

    Attributes:
        resident: Its largest resident size (VmHWM); pages of mapped files count.
        anonymous: Resident pages that belong to no file, which cannot be dropped (RssAnon).
        address_space: Its largest address space, which the limit is about (VmPeak).
    """

    resident: int = 0
    anonymous: int = 0
    address_space: int = 0

    def largest(self, other: "Memory") -> "Memory":
        """The larger of each."""
        return Memory(*(max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class Finished:
    """A command that has run.

    Attributes:
        code: Its exit code; negative: the signal that ended it.
        seconds: Wall time.
        processor_seconds: Of all its threads.
        peak: The most it took.
    """

    code: int
    seconds: float
    processor_seconds: float
    peak: Memory


def read_memory(status: str) -> Memory:
    """Of a process, from the text of its ``/proc/PID/status``; nothing where it has ended."""
    found = {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return Memory(found.get("VmHWM", 0), found.get("RssAnon", 0), found.get("VmPeak", 0))


def run_limited(
    command: Sequence[str], limit_bytes: int | None, log: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command under a limit.

    Args:
        command: Program and arguments.
        limit_bytes: Of its address space; None is no limit.
        log: File for what it prints.
        environment: Variables beside those of this process.
    """

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf8") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, preexec_fn=limit
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        before = _processor_seconds()
        try:
            code = process.wait()
        finally:
            process.kill()
            sampler.end()
    return Finished(code, time.perf_counter() - start, _processor_seconds() - before, sampler.peak)


def _processor_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Sampler(threading.Thread):
    """Keeps the peak of a process until it is told to end."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._ended = Path(f"/proc/{pid}/status"), threading.Event()
        self.peak = Memory()

    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                self.peak = self.peak.largest(read_memory(self._status.read_text()))
            except OSError:
                return

    def end(self) -> None:
        self._ended.set()
        self.join()
