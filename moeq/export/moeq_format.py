"""moeq's own checkpoint: a Hugging Face folder that holds quantized weights packed, and everything else as it was.

``write_checkpoint`` builds the packed model out of the dense one and its codes, and lets transformers save it, so that
a checkpoint that is written and one that is loaded and saved again have the same keys.
"""

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

from moeq.checkpoint.names import module_keys, packed_conversions
from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.quantizer import METHOD, MoEQConfig
from moeq.disk.folder import atomic_folder, check_integrity, check_target, weight_files, write_manifest
from moeq.export.assemble import pack_model, packed_skeleton
from moeq.models.storage import in_storage_dtypes
from moeq.quant.spec import QuantizedWeight

__all__ = ["CheckpointReport", "check_integrity", "check_target", "read_quantized", "write_checkpoint"]
MAX_SHARD = "5GB"


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


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    quantized: dict[str, QuantizedWeight],
    directory: Path | str,
    *,
    metadata: dict[str, Any],
    overwrite: bool = False,
) -> CheckpointReport:
    """Write the packed checkpoint; the folder appears complete or not at all.

    Args:
        model: Dense model that holds the dequantized values; its other tensors are written as they are, in the dtypes
            of the source's files.
        tokenizer: Tokenizer of the model, or None.
        quantized: Codes by canonical weight name; the scales have the dtype of the source's files.
        directory: Folder to create.
        metadata: JSON values kept in ``config.json`` and in the manifest.
        overwrite: Replace a folder that exists.

    Raises:
        ValueError: The folder is taken, the family's experts cannot be expressed, or a quantized weight is not one of
            the model's (name, shape, dtype of its scales), or other tensors hold values that the files' dtypes do not.
    """
    check_target(directory, overwrite=overwrite)  # before the work, not after it
    with in_storage_dtypes(model), atomic_folder(directory, overwrite=overwrite) as folder:
        packed = pack_model(model, quantized, metadata)
        packed.save_pretrained(folder, max_shard_size=MAX_SHARD)
        finish_folder(folder, tokenizer, kind=METHOD, metadata=metadata)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        num_tensors = sum(len(keys) for keys in _file_keys(folder).values())
    return CheckpointReport(
        directory=str(directory),
        bytes_total=sum(sizes),
        bytes_quantized=_packed_bytes(packed),
        num_tensors=num_tensors,
        num_quantized=len(quantized),
        num_files=len(sizes),
    )


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
