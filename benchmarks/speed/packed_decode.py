"""Decoding with a small model of drawn weights: bfloat16, prepared packed weights, llama.cpp with the same codes."""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig

from benchmarks.lab.tables import Row, markdown
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.speed.made_packed import SMALL_MODEL, dense_model, gguf_of, packed_model
from moeq.checkpoint.names import weight_names
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.prepare import model_bytes, prepare

GRID = PackedFormat(4, 32, symmetric=True)  # llama.cpp's Q4_0
PROMPT = 8
UNLIMITED = 1e12
SIDES = ("bfloat16", "packed", "packed, with room", "llama.cpp")


@cache
def models(layers: int) -> dict[str, Any]:
    """The sides, and MiB of each under its name."""
    config = Qwen3MoeConfig(**SMALL_MODEL | {"num_hidden_layers": layers})
    dense = dense_model(config)
    grids = {name: GRID for name in weight_names(dense) if name.startswith("model.layers.")}
    packed, roomy = packed_model(config, grids), packed_model(config, grids)
    with tempfile.TemporaryDirectory() as folder:
        path = gguf_of(packed, Path(folder))
        size, runtime = path.stat().st_size, LlamaCpp(path)  # which maps the file and keeps it open
    prepare(packed)
    prepare(roomy, UNLIMITED)
    sides = dict(zip(SIDES, (dense, packed, roomy, runtime), strict=True))
    sizes = [*(model_bytes(model) for model in (dense, packed, roomy)), size]
    return {"sides": sides, "bytes": dict(zip(SIDES, sizes, strict=True))}


def decode_row(sequences: int, layers: int, num_tokens: int, turns: int = 3) -> Row:
    """Seconds per step of each side, the median of a turn, in every turn."""
    found = models(layers)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(turns):
        for name, side in found["sides"].items():
            steps = (
                side.step_seconds(sequences, PROMPT, num_tokens)
                if name == "llama.cpp"
                else (step_seconds(side, sequences, num_tokens))
            )
            seconds[name].append(median(steps))
    return {"seconds": seconds, "bytes": found["bytes"]}


def step_seconds(model: PreTrainedModel, sequences: int, num_tokens: int) -> list[float]:
    """Processor seconds of each of some tokens after a prompt."""
    vocabulary = model.config.vocab_size
    found = model(torch.randint(0, vocabulary, (sequences, PROMPT)), use_cache=True)
    steps = []
    for _ in range(num_tokens):
        ids = torch.randint(0, vocabulary, (sequences, 1))
        start = process_time()
        found = model(ids, past_key_values=found.past_key_values, use_cache=True)
        steps.append(process_time() - start)
    return steps


def decode_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        llama = row["seconds"]["llama.cpp"]
        for name, seconds in row["seconds"].items():
            share = median(a / b for a, b in zip(llama, seconds, strict=True))
            rate = f"{row['num'] / min(seconds):.1f}"
            lines.append([row["num"], name, rate, f"{share:.2f}", f"{row['bytes'][name] / 2**20:.0f}"])
    return markdown(["sequences", "side", "tokens/s", "of llama.cpp's", "MiB"], lines)
