"""moeq's own checkpoint: a Hugging Face folder that holds quantized weights packed, and everything else as it was.

``write_packed`` writes the files that ``save_pretrained`` of the packed model would write, without making that model:
a checkpoint that is written and one that is loaded and saved again have the same keys.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moeq.checkpoint.model_class import model_class, runs_code
from moeq.checkpoint.names import check_expressible, module_keys, packed_conversions
from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.quantizer import METHOD, MoEQConfig
from moeq.disk.folder import atomic_folder, check_integrity, check_target, weight_files, write_manifest
from moeq.export.assemble import packed_block, packed_counterpart, packed_declared, packed_format, packed_skeleton
from moeq.export.card import Kind, Tally, write_card
from moeq.export.companions import copy_companions
from moeq.export.finished import FinishedModel, Progress, held, silent
from moeq.export.layout import Layout, plan_layout
from moeq.export.made import Made
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
        num_carried: Tensors of the source's files that no parameter of the model is made of, copied byte by byte.
        num_draft: Of these, those of draft layers.
        num_files: Files, the manifest included.
    """

    directory: str
    bytes_total: int
    bytes_quantized: int
    num_tensors: int
    num_quantized: int
    num_carried: int
    num_draft: int
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
    made: Made | None = None,
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
        made: For its card; None is what the model itself tells.
        overwrite: Replace a folder that exists.
        progress: Shows how many blocks are written.

    Raises:
        ValueError: The folder is taken; see ``fill_packed``.
    """
    check_target(directory, overwrite=overwrite)  # before the work, not after it
    with atomic_folder(directory, overwrite=overwrite) as folder:
        report = fill_packed(
            source, tokenizer, grids, folder, metadata=metadata, measured=measured, made=made, progress=progress
        )
    return replace(report, directory=str(directory))


def fill_packed(
    source: FinishedModel,
    tokenizer: Any,
    grids: Mapping[str, PackedFormat],
    folder: Path,
    *,
    metadata: dict[str, Any],
    measured: dict[str, Any] | None = None,
    made: Made | None = None,
    progress: Progress = silent,
) -> CheckpointReport:
    """Write the files of a packed checkpoint into an empty folder; see ``write_packed``.

    Raises:
        ValueError: A quantized weight is not one of the model's (name, shape, dtype of its
            scales) or not on its grid, or other tensors hold values that the files' dtypes do not.
    """
    skeleton, origin = packed_counterpart(source.model, grids, metadata), source.origin
    layout = plan_layout(skeleton, packed_declared(source.model, skeleton), origin.carried)
    write_weights(source, layout, lambda block: packed_block(source, skeleton, grids, block), folder, progress)
    counts = tally("packed", layout, source)
    finish_folder(folder, source, tokenizer, counts, kind=METHOD, metadata={**metadata, **(measured or {})}, made=made)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return CheckpointReport(
        directory=str(folder),
        bytes_total=sum(sizes),
        bytes_quantized=_packed_bytes(skeleton),
        num_tensors=len(layout.declared),
        num_quantized=len(grids),
        num_carried=len(origin.carried),
        num_draft=origin.num_draft,
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


def finish_folder(
    folder: Path,
    source: FinishedModel,
    tokenizer: Any,
    counts: Tally,
    *,
    kind: str,
    metadata: dict[str, Any],
    made: Made | None = None,
) -> None:
    """Add what is no weight to a folder of weights: the source's other files, a card, and the manifest.

    Args:
        folder: Of the export.
        source: Whose files are copied; a model that has none gives its ``tokenizer``, if any.
        tokenizer: Of the model, or None.
        counts: What the weight files hold, for the card.
        kind: Of the export, for the manifest.
        metadata: JSON values for the manifest.
        made: For the card.
    """
    origin = source.origin
    if origin.folder is not None:
        copy_companions(origin.folder, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    made = made or Made(str(getattr(source.model.config, "_name_or_path", "") or source.model.config.model_type))
    write_card(folder, made, counts, origin.folder)
    versions = {"moeq": _own_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    carried = {"num_carried": counts.num_carried, "num_draft": counts.num_draft}
    write_manifest(folder, {"kind": kind, "versions": versions, "metadata": metadata, **carried})


def tally(kind: Kind, layout: Layout, source: FinishedModel) -> Tally:
    """What the planned files of an export hold."""
    carried, layers = source.origin.carried, _packed_layers(layout.skeleton)
    num_parts = sum(name != "bias" for layer in layers for name, _ in layer.named_parameters())
    return Tally(
        kind=kind,
        num_bytes=layout.num_bytes,
        num_quantized=len(layers),
        num_kept=len(layout.declared) - num_parts - len(carried),
        num_carried=len(carried),
        num_draft=source.origin.num_draft,
        opener=model_class(layout.skeleton.config).__name__,
        runs_code=runs_code(layout.skeleton),
    )


def read_quantized(directory: Path | str, *, trust_remote_code: bool = False) -> dict[str, QuantizedWeight]:
    """Codes, scales and zero points of a packed checkpoint, by canonical name; no dense weight is made.

    Args:
        directory: Its folder.
        trust_remote_code: Run code that comes with it.

    Raises:
        ValueError: The folder is damaged (see ``check_integrity``) or is not a packed checkpoint.
    """
    check_integrity(directory)
    model_config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    description = getattr(model_config, "quantization_config", None)
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise ValueError(f"{directory} is not a packed checkpoint of moeq; give the folder that an export wrote")
    config = MoEQConfig.from_dict(description)
    skeleton = packed_skeleton(model_config, config, config.scale_dtype, trust_remote_code=trust_remote_code)
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
    return sum(p.nbytes for layer in _packed_layers(model) for name, p in layer.named_parameters() if name != "bias")


def _packed_layers(model: PreTrainedModel) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


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
