"""Memory of a plan's files: a process of its own opens them, decodes some tokens, and says what it took.

    python -m benchmarks.speed.plan_memory moeq FOLDER SMALL
    python -m benchmarks.speed.plan_memory llama.cpp FOLDER SMALL

Both are folders of ``plan_files.write_files``.  The small one is opened first, so that libraries are loaded; bytes are
those by which the resident set grows then.  Pages of a mapped file count, as a limit on a process counts them.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.lab.tables import Row
from benchmarks.large.limited import read_memory
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.speed.packed_decode import PROMPT, step_seconds
from benchmarks.speed.plan_files import open_in_moeq
from moeq.checkpoint.prepare import model_bytes
from moeq.formats.gguf import NAME
from moeq.preflight.meter import resident_bytes, start_peak

NUM_TOKENS = 3


def memory_of(side: str, folder: Path, small: Path) -> Row:
    """What a new process takes for the files of a folder; see ``measure``.

    Raises:
        RuntimeError: It failed, with the end of what it said.
    """
    command = [sys.executable, "-m", __spec__.name, side, str(folder), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(open_and_decode: Callable[[], tuple[object, Row]]) -> Row:
    """Bytes that something takes: ``resident`` at the end, ``peak`` in between.

    Args:
        open_and_decode: Returns what stays open, and what else is known, which comes along.
    """
    gc.collect()
    start_peak(torch.device("cpu"))
    before = resident_bytes()
    opened, found = open_and_decode()
    gc.collect()
    peak = read_memory(Path("/proc/self/status").read_text(encoding="utf8")).resident
    taken = {"resident": resident_bytes() - before, "peak": peak - before}
    del opened
    return taken | found


@torch.no_grad()
def _in_moeq(folder: Path) -> tuple[object, Row]:
    model = open_in_moeq(folder / "export")
    step_seconds(model, 1, NUM_TOKENS)
    num_bytes = sum(path.stat().st_size for path in (folder / "export").glob("*.safetensors"))
    return model, {"tensors": model_bytes(model), "file": num_bytes}


def _in_llama(folder: Path) -> tuple[object, Row]:
    path = folder / "gguf" / NAME
    model = LlamaCpp(path)
    model.step_seconds(1, PROMPT, NUM_TOKENS)
    return model, {"file": path.stat().st_size}


SIDES = {"moeq": _in_moeq, "llama.cpp": _in_llama}


def main() -> None:
    """Print what one side takes for a folder, as a line of JSON."""
    side, folder, small = sys.argv[1:]
    torch.set_num_threads(1)
    kept, _ = SIDES[side](Path(small))
    print(json.dumps(measure(lambda: SIDES[side](Path(folder)))))
    del kept


if __name__ == "__main__":
    main()
