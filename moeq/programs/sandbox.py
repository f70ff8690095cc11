"""Model-written programs, each in a confined process of its own: limits, verdicts, and what this system protects from.

The layers themselves are in ``moeq/programs/confinement``; what each protects from, and what none does, is in
``docs/code_execution.md``.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from moeq.programs.watch import run_confined

LAYERS = (
    "user namespace",
    "mount namespace",
    "network namespace",
    "process namespace",
    "shared memory namespace",
    "host name namespace",
    "private file system",
    "own user",
    "no capabilities",
    "no new privileges",
    "landlock",
    "seccomp",
)
# What a program must not do, and the layers each of which prevents it.
PURPOSES = {
    "use the network": ("network namespace", "seccomp"),
    "leave processes behind": ("process namespace", "seccomp"),
    "start any number of processes": ("process limit", "seccomp"),
    "signal other processes": ("process namespace", "seccomp"),
    "write files outside of its directory": ("private file system", "landlock"),
    "read other files": ("private file system", "landlock"),
    "read other processes' environment": ("private file system", "landlock", "own user"),
    "fill the disk": ("private file system",),
    "take any amount of memory": ("memory limit",),
    "take any amount of processor time": ("processor time limit",),
    "write files of any size": ("file size limit",),
}


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: Time on the clock; also ends programs that only wait.
        cpu_seconds: Whole seconds of processor time: the limit that ends endless loops, so that verdicts do not depend
            on how busy the machine is.  The slowest reference program of MBPP takes 2 on a current processor.
        memory_bytes: Address space.
        file_bytes: Size of each file.
        disk_bytes: Size of all files, kept in memory, where the system allows a private file system.
        processes: Threads that it may start, and processes where no layer forbids them altogether.
        open_files: Open files.
        output_bytes: Tail of its standard error that is kept; the rest is thrown away, as all standard output is.
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 4096

    def __post_init__(self) -> None:
        """Refuse limits under which nothing can run."""
        smallest = {"memory_bytes": 64 << 20, "open_files": 16}
        for name, value in asdict(self).items():
            least = smallest.get(name, 0 if name == "seconds" else 1)
            if value < least or value == 0:
                raise ValueError(f"{name} ({value}) must be at least {least or 'more than 0'}; choose a higher limit")


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    Attributes:
        passed: It came to its last line.
        reason: "passed", "failed: " with the exception, "timed out", "out of memory" or "killed by " with the signal.
        seconds: Time on the clock, without that of the confinement.
        stderr: Tail of what it wrote to standard error, with the traceback.
        layers: What confined it.
    """

    passed: bool
    reason: str
    seconds: float
    stderr: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Protections:
    """What this system really gives.

    Attributes:
        layers: Layers that took effect.
        missing: What a program can do in spite of them, in the words of ``PURPOSES``.
    """

    layers: tuple[str, ...]
    missing: tuple[str, ...]


def check_permission(execute_code: bool, task: str) -> None:
    """Refuse to run model-written programs that nobody asked to run; raises ValueError unless ``execute_code``."""
    if not execute_code:
        raise ValueError(
            f"task {task!r} runs programs that the model wrote, on this machine, and execute_code is false; read "
            "docs/code_execution.md, then give --data.execute_code true, or leave the task out"
        )


def protections(limits: Limits | None = None, layers: Sequence[str] = LAYERS) -> Protections:
    """Find out what confines a program here, by running an empty one.

    Raises:
        ValueError: This system lacks what no program may be run without.
    """
    given = run_program("", limits or Limits(), layers).layers
    missing = tuple(purpose for purpose, ways in PURPOSES.items() if not set(ways) & set(given))
    return Protections(given, missing)


def run_programs(
    programs: Sequence[str],
    limits: Limits,
    num_workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """Run programs, some at a time, and return their verdicts in the order of the programs.

    Args:
        programs: Python source code.
        limits: Of each.
        num_workers: Programs that run at the same time.
        progress: Called with the number of verdicts so far.

    Raises:
        ValueError: ``num_workers`` is not positive, or see ``run_program``.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers ({num_workers}) must be at least 1; choose at most the number of processors")
    verdicts = []
    pool = ThreadPoolExecutor(num_workers)
    try:
        for verdict in pool.map(lambda program: run_program(program, limits), programs):
            verdicts.append(verdict)
            if progress is not None:
                progress(len(verdicts))
    finally:
        pool.shutdown(cancel_futures=True)
    return verdicts


def run_program(program: str, limits: Limits, layers: Sequence[str] = LAYERS) -> Verdict:
    """Run one program in a process of its own, in an empty directory that is removed afterwards.

    Args:
        program: Python source code; only the standard library can be imported.
        limits: What it may use.
        layers: Layers to use where the system has them; fewer only to test one without the others.

    Raises:
        ValueError: Not a POSIX system, or the confined process did not start.
    """
    if os.name != "posix":
        raise ValueError(
            f"model-written programs cannot be confined on {sys.platform}; use Linux, or leave the task out"
        )
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        request = asdict(limits) | {"program": program, "layers": tuple(layers), "folder": os.path.realpath(folder)}
        seen = run_confined(request, limits.seconds, limits.output_bytes)
    ready, outcome = (*seen.reports, "", "")[:2]
    if not ready.startswith("ready"):
        raise ValueError(
            f"the confined process did not start ({_ending(seen.exit_code)}); raise memory_bytes "
            f"({limits.memory_bytes}), or see its errors: {seen.errors[-1000:] or 'none'}"
        )
    given = tuple(name for name in ready.removeprefix("ready").strip().split(",") if name)
    reason = outcome or ("timed out" if seen.timed_out else _ending(seen.exit_code))
    return Verdict(reason == "passed", reason, seen.seconds, seen.errors, given)


def _ending(exit_code: int) -> str:
    """Words for the exit of a program that reported nothing; -N, and 128 + N in a process namespace, is signal N."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in (signal.SIGXCPU, signal.SIGALRM):
        return "timed out"
    if number in {int(known) for known in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return f"failed: ended with exit status {exit_code} before its last line"
