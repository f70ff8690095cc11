"""Files of a plan: how large, how long they take to open and in which memory, and how fast llama.cpp runs them."""

import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.lab.tables import Row
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.speed.made_packed import dense_model, export_of, packed_model
from benchmarks.speed.plan_speed import prompt_seconds
from moeq.checkpoint.packed import IMPLEMENTATION
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.export.contents import read_contents
from moeq.export.finished import silent
from moeq.formats.convert import convert
from moeq.formats.gguf import FORMAT, NAME
from moeq.formats.source import PackedExport
from tests.tiny import tiny_tokenizer


def write_files(config: PretrainedConfig, grids: Mapping[str, PackedFormat], folder: Path) -> Row:
    """The packed folder ``export`` and, where llama.cpp has types for the plan, ``gguf``; bytes, or why not.

    Args:
        config: Of the model.
        grids: The plan; empty writes the model in bfloat16.
        folder: For both.
    """
    if grids:
        export_of(packed_model(config, grids), folder)
        try:
            convert(folder / "export", "gguf", folder / "gguf")
        except ValueError as error:
            return {"refused": str(error)}
    else:
        dense_model(config).save_pretrained(folder / "export")
        tiny_tokenizer().save_pretrained(folder / "export")
        (folder / "gguf").mkdir()
        source = folder / "export"
        FORMAT.write(PackedExport(source, read_contents(source)), folder / "gguf", "exact", silent)
    return {"gguf_bytes": (folder / "gguf" / NAME).stat().st_size}


def opened_in_moeq(export: Path, prompt: int) -> Row:
    """Processor seconds of opening a folder, resident MiB then, and their peak after a token and a prompt."""

    def work() -> Row:
        start = process_time()
        options: dict[str, Any] = {"dtype": "bfloat16", "experts_implementation": IMPLEMENTATION}
        model = AutoModelForCausalLM.from_pretrained(export, **options).eval()
        seconds, resident = process_time() - start, status("VmRSS")
        with torch.no_grad():
            prompt_seconds(model, 1)
            prompt_seconds(model, prompt)
        return {"seconds": seconds, "resident": resident, "peak": status("VmHWM")}

    return _in_child(work)


def opened_in_llama(gguf: Path, prompt: int) -> Row:
    """The same of a file in llama.cpp, whose pages are read when they are first used: resident after a token."""

    def work() -> Row:
        start = process_time()
        model = LlamaCpp(gguf / NAME)
        model.prompt_seconds(1)
        seconds, resident = process_time() - start, status("VmRSS")
        model.prompt_seconds(prompt)
        return {"seconds": seconds, "resident": resident, "peak": status("VmHWM")}

    return _in_child(work)


def status(key: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _in_child(work: Callable[[], Row]) -> Row:
    """What a fork of this process finds; memory is what it takes beyond its start."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        before = status("VmRSS")
        found = work()
        there.send(found | {key: found[key] - before for key in ("resident", "peak")})

    child = context.Process(target=run)
    child.start()
    there.close()
    try:
        found: Row = here.recv()
    finally:
        child.join()
    return found
