"""Files of a plan: how large they are, and how long they take to open in moeq and in llama.cpp."""

from collections.abc import Mapping
from pathlib import Path
from time import process_time
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.lab.tables import Row
from benchmarks.runtimes.llama_cpp import LlamaCpp
from benchmarks.speed.made_packed import dense_model, export_of, packed_model
from moeq.checkpoint.packed import IMPLEMENTATION
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.export.contents import read_contents
from moeq.export.finished import silent
from moeq.formats.convert import convert
from moeq.formats.gguf import FORMAT, NAME
from moeq.formats.source import PackedExport
from tests.tiny import tiny_tokenizer


def write_files(config: PretrainedConfig, grids: Mapping[str, PackedFormat], folder: Path) -> Row:
    """The packed folder ``export`` and, where llama.cpp has types for the plan, ``gguf``; its types, or why not.

    Args:
        config: Of the model.
        grids: The plan; empty writes the model in bfloat16.
        folder: For both.
    """
    if grids:
        export_of(packed_model(config, grids), folder)
        try:
            types = convert(folder / "export", "gguf", folder / "gguf").types
        except ValueError as error:
            return {"refused": str(error)}
    else:
        types = {"BF16": 1}
        dense_model(config).save_pretrained(folder / "export")
        tiny_tokenizer().save_pretrained(folder / "export")
        (folder / "gguf").mkdir()
        source = folder / "export"
        FORMAT.write(PackedExport(source, read_contents(source)), folder / "gguf", "exact", silent)
    return {"types": types}


def write_mlx(config: PretrainedConfig, grids: Mapping[str, PackedFormat], folder: Path) -> Row:
    """The folder ``mlx`` of a plan, or why there is none; its bytes.

    Args: See ``write_files``.  A model in bfloat16 is the folder of transformers, which mlx-lm opens itself.
    """
    if grids:
        export_of(packed_model(config, grids), folder)
        try:
            convert(folder / "export", "mlx", folder / "mlx")
        except ValueError as error:
            return {"refused": str(error)}
    else:
        dense_model(config).save_pretrained(folder / "mlx")
    return {"bytes": sum(path.stat().st_size for path in (folder / "mlx").glob("*.safetensors"))}


def open_in_moeq(export: Path) -> PreTrainedModel:
    """The model of a folder in transformers, in the forms that a machine multiplies by."""
    options: dict[str, Any] = {"dtype": "bfloat16", "experts_implementation": IMPLEMENTATION}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(export, **options)
    return model


def opened_in_moeq(export: Path) -> Row:
    """Processor seconds of opening a folder."""
    start = process_time()
    open_in_moeq(export)
    return {"seconds": process_time() - start}


def opened_in_llama(gguf: Path) -> Row:
    """Processor seconds of opening a file in llama.cpp and of a token, by which its pages are read."""
    start = process_time()
    model = LlamaCpp(gguf / NAME)
    model.prompt_seconds(1)
    seconds = process_time() - start
    model.close()
    return {"seconds": seconds}
