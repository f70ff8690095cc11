"""What a result came from: command, commit, hardware, in one line for the head of a table."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def origin(script: str, args: Sequence[str] | None) -> str:
    """Such as `` `python benchmarks/solve.py --quick` at 1a2b3c4 on x86_64, 2 cores, CPU``.

    Paths inside the repository are given from its root, from which the command is run.

    Args:
        script: ``__file__`` of the benchmark.
        args: What its main was given; None is the command line.
    """
    threads = f"OMP_NUM_THREADS={value} " if (value := os.environ.get("OMP_NUM_THREADS")) else ""
    options = " ".join(sys.argv[1:] if args is None else args).replace(f"{ROOT}/", "")
    path = Path(script).resolve().relative_to(ROOT)
    command = f"{threads}python {path} {options}".strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return f"`{command}` at {commit.strip()} on {platform.machine()}, {os.cpu_count()} cores, CPU"
