"""Memory of a plan's files: a process of its own opens them, decodes some tokens, and says what it took.

    python -m benchmarks.speed.plan_memory moeq FOLDER
    python -m benchmarks.speed.plan_memory llama.cpp FILE

Bytes are those of the resident set beyond what the process had before it opened anything, its libraries loaded.  Pages
of a mapped file count, as a limit on a process counts them.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.lab.tables import Row
from benchmarks.large.limited import read_memory
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.speed.packed_decode import PROMPT, step_seconds
from benchmarks.speed.plan_files import open_in_moeq
from moeq.checkpoint.prepare import model_bytes
from moeq.preflight.meter import resident_bytes, start_peak

NUM_TOKENS = 3


def memory_of(side: str, path: Path) -> Row:
    """What a new process takes for a file or folder; see ``measure``."""
    command = [sys.executable, "-m", __spec__.name, side, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(open_and_decode: Callable[[], Mapping[str, int]]) -> dict[str, int]:
    """Bytes that a function leaves resident (``resident``) and its most in between (``peak``), beside what it returns.

    The function keeps what it opened; what it says of it comes along.
    """
    x_MI = torch.ones(8, 64, dtype=torch.bfloat16)
    _ = x_MI @ x_MI.mT  # libraries of products are loaded at the first one
    gc.collect()
    start_peak(torch.device("cpu"))
    before = resident_bytes()
    found = open_and_decode()
    gc.collect()
    peak = read_memory(Path("/proc/self/status").read_text(encoding="utf8")).resident
    return {"resident": resident_bytes() - before, "peak": peak - before, **found}


def _in_moeq(export: Path) -> dict[str, int]:
    before = resident_bytes()
    model = open_in_moeq(export)
    opened = resident_bytes() - before
    with torch.no_grad():
        step_seconds(model, 1, NUM_TOKENS)
    _KEPT.append(model)
    num_bytes = sum(path.stat().st_size for path in export.glob("*.safetensors"))
    return {"opened": opened, "tensors": model_bytes(model), "file": num_bytes}


def _in_llama(path: Path) -> dict[str, int]:
    before = resident_bytes()
    model = LlamaCpp(path)
    opened = resident_bytes() - before
    model.step_seconds(1, PROMPT, NUM_TOKENS)
    _KEPT.append(model)
    return {"opened": opened, "file": path.stat().st_size}


_KEPT: list[object] = []
SIDES = {"moeq": _in_moeq, "llama.cpp": _in_llama}


def main() -> None:
    """Print what one side takes for one path, as a line of JSON."""
    side, path = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(measure(lambda: SIDES[side](Path(path)))))


if __name__ == "__main__":
    main()
