"""Commands in processes of their own, forked from a server that has imported everything once.

A fresh interpreter imports torch, transformers and Lightning for five to eight seconds before it does anything.  A fork
of the tests' own process will not do either: once gradients were computed, torch refuses to compute them in a fork.
The server does nothing but import, so its forks start like fresh interpreters, in a few milliseconds.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["moeq.cli", "callbacks.figures", "moeq.checkpoint.quantizer", "transformers", "lightning.pytorch"]
)
# Ranks that are forked from such a process; ``moeq_ddp`` starts a fresh interpreter for each rank but the first.
TWO_RANKS = [
    "--trainer.devices=2",
    "--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy",
    "--trainer.strategy.start_method=fork",
]


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    """``python main.py`` with arguments, in a fork: its exit code (negative: a signal) and what it printed.

    A fit draws no figures, as in ``tests.test_main.fit``.
    """
    return call(_main, args)


def call(function: Callable[..., None], *args: Any) -> subprocess.CompletedProcess[str]:
    """A function of a module, with arguments that can be pickled, in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_redirected, args=(streams, function, args))
        process.start()
        try:
            process.join()
        finally:  # a test that ran out of time leaves nothing behind
            process.kill()
        return subprocess.CompletedProcess(args, process.exitcode, *(path.read_text() for path in streams))


def _redirected(streams: list[Path], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks that it may start
    import torch

    torch.set_num_threads(1)
    function(*args)


def _main(args: list[str]) -> None:
    import callbacks.figures

    callbacks.figures._drawings = lambda run: {}
    sys.argv = ["main.py", *args]
    runpy.run_path("main.py", run_name="__main__")
