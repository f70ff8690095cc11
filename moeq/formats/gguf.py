"""GGUF: one file for llama.cpp and what is built on it (Ollama, LM Studio), exactly from codes and scales."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.disk.folder import MANIFEST, write_manifest
from moeq.export.compare import ExportMismatchError
from moeq.export.finished import Progress
from moeq.export.origin import source_folder
from moeq.formats.card import Card, write_card
from moeq.formats.format import Format, FormatReport
from moeq.formats.gguf_blocks import Bytes, plain, rounding_bound, to_bytes
from moeq.formats.gguf_file import OWN, StoredTensor, Whole64, read_file, write_file
from moeq.formats.gguf_metadata import common
from moeq.formats.gguf_nvfp4 import scale_name
from moeq.formats.gguf_plan import Planned, find_family, number_keys, plan_file
from moeq.formats.gguf_rope import Metadata
from moeq.formats.gguf_tokenizer import tokenizer_metadata
from moeq.formats.language_model import left_out
from moeq.formats.source import PackedExport
from moeq.quant.carrier import CarrierMode
from moeq.quant.kinds import NAMED
from moeq.quant.spec import QuantizedWeight, middle

NAME = "model.gguf"
# Numbers of llama.cpp for a file most of whose weights have a type; it shows them and does not read by them.
_FILE_KINDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "MXFP4": 38, "NVFP4": 39,
}  # fmt: skip

_OPENING = f"""One file with codes, configuration and tokenizer, for llama.cpp and what is built on it:

```sh
llama-server -m gguf/{NAME}
```"""
_LIMITS = ("Exact agreement with what was measured: llama.cpp rounds activations to 8 bits where weights have codes.",)
_TEXT_ALONE = (
    "Images and sound: the file holds the language model alone. What turns these into its embeddings is a second file "
    "(`mmproj`), which llama.cpp's converter makes of the source."
)
_LEFT_OUT = "tensors of the source that its model does not compute with, draft layers among them"


def _check(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> None:
    plan_file(model, grids, mode)
    _describe(model)
    source = source_folder(model)
    if source is not None:
        tokenizer_metadata(source, model.config)


def _write(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> None:
    plan = plan_file(export.model, export.grids, mode)
    architecture = find_family(export.model).architecture
    kind, _ = Counter(each.stored.kind for each in plan for _ in each.weights).most_common(1)[0]
    metadata = {
        "general.name": Path(str(export.config.get("_name_or_path") or export.folder.resolve().parent.name)).name,
        "general.quantized_by": "moeq",
        "general.quantization_version": 2,
        **({"general.file_type": _FILE_KINDS[kind]} if kind in _FILE_KINDS else {}),
        **{f"{architecture}.{key}": value for key, value in (_describe(export.model) | _numbers(export)).items()},
        **tokenizer_metadata(export.folder, export.model.config),
    }
    shown = iter(progress(range(len(plan)), "tensors of the file"))
    tensors = {each.name: (each.stored, lambda each=each: _chunks(export, each, mode, shown)) for each in plan}
    write_file(folder / NAME, architecture, metadata, tensors)
    for _ in shown:  # it ends by itself
        pass
    types = dict(Counter(planned.stored.kind for planned in plan for _ in planned.weights).most_common())
    limits = (_TEXT_ALONE, *_LIMITS) if find_family(export.model).language_model else _LIMITS
    write_card(export, folder, Card("gguf", "gguf", _OPENING, types, limits, _LEFT_OUT))
    manifest = export.folder / MANIFEST  # a folder that transformers saved has none
    made_of = json.loads(manifest.read_text(encoding="utf8")) if manifest.is_file() else {}
    write_manifest(folder, {**{key: value for key, value in made_of.items() if key != "files"}, "kind": "gguf"})


def _chunks(export: PackedExport, planned: Planned, mode: CarrierMode, shown: Iterator[int]) -> Iterator[Bytes]:
    """Bytes of a tensor of the file, those of one weight after another."""
    next(shown)
    if not planned.has_blocks:
        for values in planned.values(export):
            yield plain(planned.stored.kind, values)
        return
    for name in planned.weights:
        try:
            yield to_bytes(planned.stored.kind, planned.piece.of_codes(export.quantized(name)), mode)
        except ValueError as error:
            raise ValueError(f"gguf: {name}: {error}") from error


def _verify(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> FormatReport:
    plan = plan_file(export.model, export.grids, mode)
    path = folder / NAME
    metadata, stored = read_file(path)
    architecture = find_family(export.model).architecture
    for key, numbers in _numbers(export).items():
        if metadata.get(f"{architecture}.{key}") != numbers:
            raise ExportMismatchError(f"{path} has other {key} than the model; export again")
    if wrong := sorted({each.name for each in plan} ^ stored.keys()):
        raise ExportMismatchError(f"{path} has other tensors than were written: {', '.join(wrong[:8])}; export again")
    error, types, num_bytes, numel = 0.0, Counter[str](), 0, 0
    for index in progress(range(len(plan)), "tensors read back"):
        planned = plan[index]
        found = stored[planned.name]
        if (found.kind, found.shape) != (planned.stored.kind, planned.stored.shape):
            raise ExportMismatchError(f"{path} has {planned.name} as {found.kind} {found.shape}; export again")
        # Other types have no global scales: what has such a name beside them is of the architecture (Gemma 4).
        scales = stored.get(scale_name(planned.name)) if planned.stored.kind == "NVFP4" else None
        error = max(error, _compare(path, export, planned, found, None if scales is None else scales.values()))
        found.forget()
        quantized = [name for name in planned.weights if name in export.grids]
        types.update([found.kind] * len(planned.weights))
        if quantized:
            num_bytes += planned.stored.num_bytes + (0 if scales is None else 4 * len(planned.weights))
            numel += torch.Size(planned.stored.shape).numel()
    return FormatReport(
        format="gguf",
        path=str(path),
        reader=_reader({each.stored.kind for each in plan}),
        num_quantized=len(export.grids),
        num_other=sum(1 for each in plan if not each.weights and not each.scales_of),
        num_bytes=path.stat().st_size,
        bits_per_weight=8 * num_bytes / numel if numel else 0.0,
        types=dict(types.most_common()),
        largest_error=error,
        num_left_out=len(left_out(export)),
    )


def _compare(
    path: Path, export: PackedExport, planned: Planned, found: StoredTensor, scales: Tensor | None
) -> float:  # fmt: skip
    """Largest error of a tensor that was read back, in scales; raises ExportMismatchError where it is wrong.

    Args:
        path: Of the file.
        export: What it was made of.
        planned: The tensor.
        found: What was read.
        scales: Global scales of its weights that were read beside it, if it has some.
    """
    largest = 0.0
    for index, ours in enumerate(planned.values(export)):
        theirs = found.values(index if len(planned.weights) > 1 else None).reshape(ours.shape)
        theirs = theirs if scales is None else theirs * scales[index]
        name = planned.weights[index] if planned.weights else planned.tensor or "the global scales of its weights"
        if torch.equal(theirs.to(ours.dtype), ours):
            continue
        if not planned.has_blocks or found.kind.lower() in NAMED:
            raise ExportMismatchError(f"{path}: {planned.name} is not {name}; export again")
        largest = max(largest, _rounded(path, theirs, planned.piece.of_codes(export.quantized(name)), name))
    return largest


def _rounded(path: Path, theirs: Tensor, weight: QuantizedWeight, name: str) -> float:
    """Largest error in scales of values whose scales or offsets were rounded, which is bounded."""
    spread = weight.codes_OI.shape[1] // weight.scale_OG.shape[1]
    scale_OI = weight.scale_OG.float().repeat_interleave(spread, 1)
    zero: Any = middle(weight.bits)
    if weight.zero_point_OG is not None:
        zero = weight.zero_point_OG.float().repeat_interleave(spread, 1)
    error_OI = (theirs - (weight.codes_OI.float() - zero) * scale_OI).abs()
    if bool((error_OI > rounding_bound(weight).repeat_interleave(spread, 1)).any()):
        raise ExportMismatchError(f"{path}: {name} differs by more than the rounding of its scales; export again")
    return float((error_OI / scale_OI.abs()).max())


def _describe(model: PreTrainedModel) -> Metadata:
    try:
        family, config = find_family(model), model.config.get_text_config()
        keys = common(config) | family.describe(config) | family.beside(model.config)
        windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if windows and "attention.sliding_window" not in keys:
            raise ValueError("llama.cpp computes this family without windows, and its layer_types has some")
    except ValueError as error:
        raise ValueError(f"gguf: {error}; export moeq or dense") from error
    return {key: value for key, value in keys.items() if value is not None}


def _numbers(export: PackedExport) -> Metadata:
    """Keys that are tensors of whole numbers in the model."""
    return {key: Whole64(export.tensor(name).tolist()) for name, key in number_keys(export.model).items()}


def _reader(kinds: set[str]) -> str:
    from importlib.metadata import version

    known = f"gguf {version('gguf')}"
    own = " and ".join(sorted(kinds & OWN.keys()))
    return f"{known} ({own}, which it does not dequantize, by moeq's own)" if own else known


FORMAT = Format(
    name="gguf",
    check=_check,
    write=_write,
    verify=_verify,
    serve=lambda folder: f"llama-server -m {folder / NAME}",
)
