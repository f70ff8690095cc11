"""moeq's own checkpoint: a Hugging Face folder that holds quantized weights packed, and everything else as it was.

``write_packed`` writes the files that ``save_pretrained`` of the packed model would write, without making that model:
a checkpoint that is written and one that is loaded and saved again have the same keys.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moeq.checkpoint.names import check_expressible, module_keys, packed_conversions
from moeq.checkpoint.packed import PackedFormat, PackedLinear
from moeq.checkpoint.quantizer import METHOD, MoEQConfig
from moeq.disk.folder import atomic_folder, check_integrity, check_target, weight_files, write_manifest
from moeq.export.assemble import packed_block, packed_counterpart, packed_declared, packed_format, packed_skeleton
from moeq.export.finished import FinishedModel, Progress, held, silent
from moeq.export.layout import plan_layout
from moeq.export.weights import write_weights
from moeq.quant.spec import QuantizedWeight

__all__ = ["CheckpointReport", "check_integrity", "check_target", "read_quantized", "write_checkpoint", "write_packed"]


@dataclass(frozen=True)
class CheckpointReport:
    """What was written.

    Attributes:
        directory: The folder.
        bytes_total: Bytes of all its files.
        bytes_quantized: Bytes of codes, scales, zero points and shapes of the quantized weights.
        num_tensors: Tensors in its files.
        num_quantized: Quantized weights.
        num_files: Files, the manifest included.
    """

    directory: str
    bytes_total: int
    bytes_quantized: int
    num_tensors: int
    num_quantized: int
    num_files: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def write_packed(
    source: FinishedModel,
    tokenizer: Any,
    grids: Mapping[str, PackedFormat],
    directory: Path | str,
    *,
    metadata: dict[str, Any],
    measured: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CheckpointReport:
    """Write the packed checkpoint block by block; the folder appears complete or not at all.

    Args:
        source: Dense model and its codes, whose scales have the dtype of the source's files; the other tensors are
            written as they are, in the dtypes of those files.
        tokenizer: Tokenizer of the model, or None.
        grids: Of every quantized weight, by canonical name.
        directory: Folder to create.
        metadata: JSON values kept in ``config.json`` and in the manifest.
        measured: JSON values that differ from run to run (times), kept in the manifest alone: every other file is the
            same to the byte in each run that has the same codes.
        overwrite: Replace a folder that exists.
        progress: Shows how many blocks are written.

    Raises:
        ValueError: The folder is taken, or a quantized weight is not one of the model's (name, shape, dtype of its
            scales) or not on its grid, or other tensors hold values that the files' dtypes do not.
    """
    check_target(directory, overwrite=overwrite)  # before the work, not after it
    skeleton = packed_counterpart(source.model, grids, metadata)
    layout = plan_layout(skeleton, packed_declared(source.model, skeleton))
    with atomic_folder(directory, overwrite=overwrite) as folder:
        write_weights(source, layout, lambda block: packed_block(source, skeleton, grids, block), folder, progress)
        finish_folder(folder, tokenizer, kind=METHOD, metadata={**metadata, **(measured or {})})
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return CheckpointReport(
        directory=str(directory),
        bytes_total=sum(sizes),
        bytes_quantized=_packed_bytes(skeleton),
        num_tensors=len(layout.declared),
        num_quantized=len(grids),
        num_files=len(sizes),
    )


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    directory: Path | str,
    *,
    metadata: dict[str, Any],
    overwrite: bool = False,
) -> CheckpointReport:
    """Write the packed checkpoint of a model in memory that holds the dequantized values; see ``write_packed``.

    Args:
        model: Dense model.
        tokenizer: Tokenizer of the model, or None.
        quantized: Codes of weights of its blocks, by canonical name.
        directory: Folder to create.
        metadata: JSON values kept in ``config.json`` and in the manifest.
        overwrite: Replace a folder that exists.

    Raises:
        ValueError: See ``write_packed``; the family's experts cannot be expressed, or weights lie outside of blocks.
    """
    check_target(directory, overwrite=overwrite)
    check_expressible(model)
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    return write_packed(held(model, quantized), tokenizer, grids, directory, metadata=metadata, overwrite=overwrite)


def finish_folder(folder: Path, tokenizer: Any, *, kind: str, metadata: dict[str, Any]) -> None:
    """Add tokenizer and manifest to a folder of weights."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    versions = {"moeq": _own_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    write_manifest(folder, {"kind": kind, "versions": versions, "metadata": metadata})


def read_quantized(directory: Path | str) -> dict[str, QuantizedWeight]:
    """Codes, scales and zero points of a packed checkpoint, by canonical name; no dense weight is made.

    Raises:
        ValueError: The folder is damaged (see ``check_integrity``) or is not a packed checkpoint.
    """
    check_integrity(directory)
    model_config = AutoConfig.from_pretrained(directory)
    description = getattr(model_config, "quantization_config", None)
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise ValueError(f"{directory} is not a packed checkpoint of moeq; give the folder that an export wrote")
    config = MoEQConfig.from_dict(description)
    skeleton = packed_skeleton(model_config, config, config.scale_dtype)
    conversions = packed_conversions(get_model_conversion_mapping(skeleton), config.expert_leaves)
    layers = {name: module for name, module in skeleton.named_modules() if isinstance(module, PackedLinear)}
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for path, keys in _file_keys(Path(directory)).items():
        with safe_open(path, framework="pt") as file:
            for key, parameter in module_keys(keys, skeleton, conversions).items():
                name, _, part = parameter.rpartition(".")
                if name in layers:
                    tensors[name][part] = file.get_tensor(key)
    return {name: _load(name, layer, tensors[name]) for name, layer in layers.items()}


def _load(name: str, layer: PackedLinear, tensors: dict[str, Tensor]) -> QuantizedWeight:
    absent = sorted(set(layer.state_dict()) - set(tensors))
    if absent:
        raise ValueError(f"the checkpoint lacks {absent} of {name}; export or copy it again")
    layer.load_state_dict(tensors, assign=True)
    return layer.quantized()


def _packed_bytes(model: PreTrainedModel) -> int:
    layers = (module for module in model.modules() if isinstance(module, PackedLinear))
    return sum(p.nbytes for layer in layers for name, p in layer.named_parameters() if name != "bias")


def _file_keys(folder: Path) -> dict[Path, list[str]]:
    """Keys of each weight file of a folder."""
    keys = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            keys[path] = list(file.keys())
    return keys


def _own_version() -> str:
    try:
        return version("moeq")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
