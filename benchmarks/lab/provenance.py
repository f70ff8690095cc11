"""Provenance of a result: command, commit, device, processor and threads, for the head of a table and its JSON."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# What decides how fast (and with which rounding) a processor multiplies matrices, by its name in /proc/cpuinfo.
FLAGS = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512-bf16", "amx_tile": "amx"}
# Limits by which a processor can be made to look like a lesser one.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from.

    Attributes:
        commit: Short hash of the checkout, with "+" where tracked files were changed; "unknown" outside of git.
        device: Name of the device that computed, such as "CPU" or "NVIDIA H200 (cuda)".
        processor: Architecture, model name and number of cores.
        capabilities: Instruction sets of ``FLAGS`` that the processor has, and limits that were set.
        threads: Of torch.
        torch: Its version.
    """

    commit: str
    device: str
    processor: str
    capabilities: str
    threads: int
    torch: str

    def __str__(self) -> str:
        capabilities = f" ({self.capabilities})" if self.capabilities else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.commit} on {self.device}, {self.processor}{capabilities}, {threads}, torch {self.torch}"


def provenance(device: torch.device | str = "cpu") -> Provenance:
    """Of what is computed here and now.

    Args:
        device: On which the model really is.
    """
    return Provenance(
        commit(), device_name(torch.device(device)), _processor(), _capabilities(), torch.get_num_threads(),
        str(torch.__version__),
    )  # fmt: skip


def command(module: str, args: Sequence[str] | None) -> str:
    """The command that runs a module of the benchmarks from the root of the repository.

    Such as ``python -m benchmarks.speed.solve --quick``; paths inside the repository are given from its root.

    Args:
        module: Name of a module that has been imported; ``__main__`` is the one that was started.
        args: What its main was given; None is the command line.
    """
    threads = [f"OMP_NUM_THREADS={value}"] if (value := os.environ.get("OMP_NUM_THREADS")) else []
    spec = sys.modules[module].__spec__
    options = [shlex.quote(arg.replace(f"{ROOT}/", "")) for arg in (sys.argv[1:] if args is None else args)]
    return " ".join([*threads, "python -m", spec.name if spec else module, *options])


def commit() -> str:
    """Of the checkout that these files are in."""
    hashed = _git("rev-parse", "--short", "HEAD")
    changed = "+" if hashed and _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{hashed}{changed}" if hashed else "unknown"


def device_name(device: torch.device) -> str:
    """Such as "CPU", or the name of an accelerator and its type."""
    if device.type == "cpu":
        return "CPU"
    return f"{torch.cuda.get_device_name(device)} (cuda)" if device.type == "cuda" else str(device)


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpuinfo(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _processor() -> str:
    name = _cpuinfo("model name") or platform.processor()
    return ", ".join(part for part in (platform.machine(), name, f"{os.cpu_count()} cores") if part)


def _capabilities() -> str:
    flags = _cpuinfo("flags").split()
    found = [name for flag, name in FLAGS.items() if flag in flags] or [torch.backends.cpu.get_cpu_capability().lower()]
    return " ".join([*found, *(f"{name}={value}" for name in LIMITS if (value := os.environ.get(name)))])
