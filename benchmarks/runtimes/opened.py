"""Runtimes that run in this environment: log-probabilities of the folders and files that they open."""

import importlib.util
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.runtimes.llama_cpp import LlamaCpp
from moeq.formats.gguf import NAME
from moeq.formats.source import PackedExport

_FORKS = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """A folder of a format to be opened.

    Attributes:
        folder: It.
        ids_NL: Token ids.
        export: What it was made of.
    """

    folder: Path
    ids_NL: Tensor
    export: PackedExport


# float32 [N, L, V], or why it was refused
Answer = Tensor | str


def run_llama_cpp(jobs: Sequence[Job]) -> list[Answer]:
    """llama.cpp, each file in a process of its own, since it may abort."""
    return [_in_fork(_llama_cpp, job) for job in jobs]


def run_mlx(jobs: Sequence[Job]) -> list[Answer]:
    """mlx-lm on the CPU, with scales, offsets and what is not quantized in float32, which changes no value."""
    return [_answer(_mlx, job) for job in jobs]


def run_transformers(jobs: Sequence[Job]) -> list[Answer]:
    """Transformers with compressed-tensors, in bfloat16."""
    return [_answer(_transformers, job) for job in jobs]


def is_missing(package: str) -> str | None:
    """Why a package cannot be used here; None where it can."""
    return None if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def why_not_transformers(folder: Path) -> str | None:
    """What a folder's configuration stops transformers with, where it would read wrongly; else None."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    said = config.get("transformers_weights")
    return None if said is None else f"config.json stops transformers: {said.removeprefix('none. ')}"


def _llama_cpp(job: Job) -> Tensor:
    file = LlamaCpp(job.folder / NAME)
    return torch.stack([file.logits(ids_L).log_softmax(-1) for ids_L in job.ids_NL])


def _mlx(job: Job) -> Tensor:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(job.folder)
    model.set_dtype(mx.float32)
    logits = [np.array(model(mx.array(ids_L[None].numpy())).astype(mx.float32)) for ids_L in job.ids_NL]
    return torch.from_numpy(np.concatenate(logits)).log_softmax(-1)


def _transformers(job: Job) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        return torch.cat([model(ids_L[None]).logits.float().log_softmax(-1) for ids_L in job.ids_NL])


def _answer(run: Callable[[Job], Tensor], job: Job) -> Answer:
    try:
        return run(job)
    except Exception as error:  # whatever a runtime raises is its refusal
        return f"{type(error).__name__}: {error}"


def _in_fork(run: Callable[[Job], Tensor], job: Job) -> Answer:
    ours, theirs = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_send, args=(theirs, run, job))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = ""
    process.join()
    if not isinstance(found, str):
        return torch.from_numpy(found)
    return found or f"the process died with {process.exitcode}"


def _send(pipe: Connection, run: Callable[[Job], Tensor], job: Job) -> None:
    answer = _answer(run, job)
    pipe.send(answer if isinstance(answer, str) else answer.numpy())
    pipe.close()
