"""Peaks of memory by phase: of the resident set, of the accelerator, and the bytes that a phase leaves on disk.

The resident set is that of the whole process, as a limit on it counts: libraries and pages of mapped files included.
"""

import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Measured:
    """What one phase took; ``kind`` and ``label`` are those of ``moeq.preflight.phases.Phase``.

    Attributes:
        host: Peak of the resident set.
        device: Peak of the accelerator; 0 on a CPU.
        disk: Bytes by which the run folder grew (below 0 where it shrank).
        seconds: Wall time.
    """

    kind: str
    label: str
    host: int
    device: int
    disk: int
    seconds: float


@dataclass
class _Open:
    """A phase that is going on, with the peaks before phases inside it began."""

    kind: str
    label: str
    host: int
    device: int
    disk: int
    start: float


class Meter:
    """Measures phases, which may contain others: what happens in an inner one counts for it alone.

    Attributes:
        device: Where the model computes.
        folder: Of the run; None counts no bytes on disk.
        process_bytes: Resident set of the process before a model was opened.
        measured: Phases that have ended, in the order in which they did.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.folder: Path | None = None
        self.process_bytes = resident_bytes()
        self.measured: list[Measured] = []
        self._open: list[_Open] = []

    @contextmanager
    def phase(self, kind: str, label: str) -> Iterator[None]:
        """Measure what happens within."""
        self.begin(kind, label)
        try:
            yield
        finally:
            self.end()

    def begin(self, kind: str, label: str) -> None:
        """Start a phase, within the one that is going on, if any."""
        if self._open:
            self._take_peaks(self._open[-1])
        self._open.append(_Open(kind, label, 0, 0, folder_bytes(self.folder), time.perf_counter()))
        start_peak(self.device)

    def end(self) -> None:
        """End the phase that was started last."""
        ended = self._open.pop()
        self._take_peaks(ended)
        seconds, disk = time.perf_counter() - ended.start, folder_bytes(self.folder) - ended.disk
        self.measured.append(Measured(ended.kind, ended.label, ended.host, ended.device, disk, seconds))
        if self._open:
            outer = self._open[-1]
            outer.start, outer.disk = outer.start + seconds, outer.disk + disk
        start_peak(self.device)

    @property
    def peak_host(self) -> int:
        """The largest resident set of all phases so far."""
        return max((each.host for each in self.measured), default=resident_bytes())

    def _take_peaks(self, phase: _Open) -> None:
        phase.host = max(phase.host, peak_host_bytes())
        if self.device.type == "cuda":
            phase.device = max(phase.device, int(torch.cuda.max_memory_allocated(self.device)))


def start_peak(device: torch.device) -> None:
    """Measure peaks from here on; where the system cannot (no Linux), that of the host stays the process's so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_host_bytes() -> int:
    """Largest resident set of the process since ``start_peak``."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident set of the process now."""
    try:
        return int(_STATM.read_text().split()[1]) * _page_bytes()
    except OSError:
        return peak_host_bytes()


def folder_bytes(folder: Path | None) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*") if folder is not None and folder.is_dir() else ():
        with suppress(OSError):  # a temporary file that is gone by now
            found = path.lstat()
            total += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return total


def _page_bytes() -> int:
    import resource

    return resource.getpagesize()
