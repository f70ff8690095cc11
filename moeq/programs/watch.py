"""A confined process seen from outside: started with a request, watched until it ends or its time is over, ended.

The other side is ``moeq/programs/confinement/start.py``.
"""

import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The standard library comes first, and this project's folder is not there any more when the program runs.
_SOURCE = "import sys; sys.path.append({!r}); from moeq.programs.confinement.start import main; sys.path.pop(); main()"
_START_SECONDS = 60.0  # for the confinement alone, before the program's own time
_POLL_SECONDS = 0.05  # only matters where processes that are left behind hold the pipes open
_REPORT_BYTES = 8192


@dataclass(frozen=True)
class Seen:
    """What came out of a confined process.

    Attributes:
        reports: Its reports, of which the first says that the confinement is complete, the second how it ended.
        errors: Tail of its standard error.
        seconds: Time on the clock between the first report and the end.
        timed_out: Whether it was ended for its time.
        exit_code: As ``subprocess.Popen.returncode``.
    """

    reports: tuple[str, ...]
    errors: str
    seconds: float
    timed_out: bool
    exit_code: int


def run_confined(request: Mapping[str, Any], seconds: float, output_bytes: int) -> Seen:
    """Start a confined process and wait for its end.

    Args:
        request: What ``start.py`` reads, but for the token, the pipe and the parent.
        seconds: Time from the first report on.
        output_bytes: Bytes of standard error that are kept.
    """
    token = secrets.token_hex(16).encode()
    reports, report = os.pipe()
    with open(reports, "rb", buffering=0) as report_file:
        try:
            whole = {**request, "token": token, "report": report, "parent": os.getpid()}
            process = _start(whole, report)
        finally:
            os.close(report)
        stream = _Stream(report_file.fileno(), token, output_bytes)
        try:
            timed_out = stream.watch(process, seconds)
        finally:
            ended = time.monotonic()
            _end(process)
    errors = stream.errors.decode("utf-8", "replace")
    taken = ended - (ended if stream.ready_at is None else stream.ready_at)
    return Seen(tuple(stream.lines()), errors, taken, timed_out, process.returncode)


def _start(request: dict[str, Any], report: int) -> "subprocess.Popen[bytes]":
    # No site (-S, -s), no directory of this script (-P) and none of the environment of this process.
    source = _SOURCE.format(str(Path(__file__).resolve().parents[2]))
    cached = ["-B"] if sys.dont_write_bytecode else []
    command = [sys.executable, "-s", "-S", "-P", *cached, "-c", source]
    # The order of sets depends on the hash seed, and with it whether some programs pass.
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryFile() as file:
        file.write(marshal.dumps(request))
        file.seek(0)
        return subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=request["folder"],
            env=environment,
            pass_fds=[report],
            start_new_session=True,
        )


class _Stream:
    """Reports and errors of a process while they come in."""

    def __init__(self, report: int, token: bytes, output_bytes: int) -> None:
        self.report = report
        self.token = token
        self.output_bytes = output_bytes
        self.reports = b""
        self.errors = b""
        self.ready_at: float | None = None

    def watch(self, process: "subprocess.Popen[bytes]", seconds: float) -> bool:
        """Read until the process ends; returns whether its time was over before."""
        assert process.stderr is not None
        deadline = time.monotonic() + _START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            while selector.get_map():
                ended = _has_ended(process)
                events = selector.select(0 if ended else _POLL_SECONDS)
                for key, _ in events:
                    if not self._read(key.fd):
                        selector.unregister(key.fileobj)
                if self.ready_at is None and self.lines():
                    self.ready_at = time.monotonic()
                    deadline = self.ready_at + seconds
                if time.monotonic() > deadline:
                    return True
                if ended and not events:
                    break
        # It closed both pipes, or is about to be gone.
        while not _has_ended(process):
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL_SECONDS / 50)
        return False

    def _read(self, descriptor: int) -> bool:
        """Take what is there; returns False at the end of the stream."""
        data = os.read(descriptor, 1 << 16)
        if descriptor == self.report:
            # Reports are short: what is longer is not one.
            self.reports = (self.reports + data)[:_REPORT_BYTES]
        else:
            self.errors = (self.errors + data)[-self.output_bytes :]
        return bool(data)

    def lines(self) -> list[str]:
        """Complete reports: lines behind the token."""
        start = self.token + b" "
        lines = self.reports.split(b"\n")[:-1]
        return [line.removeprefix(start).decode("ascii", "replace") for line in lines if line.startswith(start)]


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has ended; where there is a way, it is not reaped, so that its number cannot become another's."""
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process with its group; in a process namespace nothing in there outlives it."""
    # The number is still its own, and its group may have outlived it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stderr is not None:
        process.stderr.close()
    process.wait()
