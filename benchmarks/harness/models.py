"""Models, options and report of the comparisons with lm-evaluation-harness."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.llama_like import llama_like
from benchmarks.lab.provenance import command, provenance
from moeq.checkpoint.loading import load_model, load_tokenizer
from moeq.disk.atomic import write_json


def parser(description: str | None, tasks: tuple[str, ...], models: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options that equality and speed share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data-dir", type=Path, required=True, help="folder of all data sets, as in docs/tasks.md")
    found.add_argument("--tasks", nargs="+", default=list(tasks), metavar="TASK", help=" ".join(tasks))
    found.add_argument("--models", nargs="+", default=list(models), metavar="MODEL", help="folders, or llama-like")
    found.add_argument("--num-documents", type=int, help="per task, evenly spread; default: all")
    found.add_argument("--quick", action="store_true", help="4 documents per task")
    found.add_argument("--batch-tokens", type=int, default=8192, help="tokens per forward pass of moeq")
    found.add_argument("--folder", type=Path, default=Path("runs/harness"), help="written rows and models")
    found.add_argument("--json", type=Path, metavar="FILE", help="write all that was found here, and .md beside it")
    return found


def prepare(options: argparse.Namespace) -> None:
    """One thread unless OMP_NUM_THREADS says otherwise, few documents where a look is enough."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.quick:
        options.num_documents = 4


def open_model(name: str, folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder in float32; ``llama-like`` is written first."""
    if name == "llama-like":
        model, tokenizer = llama_like()
        name = str(folder / name)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return load_model(name, "float32"), load_tokenizer(name)


def origin(module: str, options: argparse.Namespace, args: Sequence[str] | None) -> str:
    """Command, commit, machine and versions; the folder of the data, which is another elsewhere, is called DATA."""
    given = ["DATA" if value == str(options.data_dir) else value for value in (sys.argv[1:] if args is None else args)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers"))
    return f"`{command(module, given)}` at {provenance()}, {versions}"


def write(options: argparse.Namespace, source: str, text: str, results: Mapping[str, Any]) -> None:
    """Print the report; where a file is given, write results as JSON and the report beside it."""
    print(f"\n{text}")
    if options.json is not None:
        write_json(options.json, {"origin": source, "num_documents": options.num_documents, "results": results})
        options.json.with_suffix(".md").write_text(f"{text}\n", encoding="utf8")
