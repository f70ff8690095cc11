"""compressed-tensors (pack-quantized): for vLLM, SGLang and others; transformers opens it where it reads it rightly.

Each weight under the key of the source's files as ``weight_packed`` (int32, the codes as one stream of bits),
``weight_scale``, ``weight_shape``, and ``weight_zero_point`` where it has zero points.  "exact" writes symmetric
weights of 4 or 8 bits, which the kernels of vLLM and SGLang take; "native" each weight's own width, for readers that
take it.  NVFP4 and MXFP4 have a layout of their own (``compressed_tensors_float``).

vLLM and SGLang give all routed experts of a block one scheme, and all linears that they merge; transformers gives one
to the experts of the whole model and reads others wrongly without a word, and it leaves out the global scales that
experts in NVFP4 have, so that it is told to refuse such a folder.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.names import weight_names
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.checkpoint.sources import raw_tensors
from moeq.disk.tensor_file import Declared
from moeq.export.compare import raise_for
from moeq.export.finished import Progress
from moeq.formats.card import Card
from moeq.formats.carriers import (
    check_alike,
    check_experts_apart,
    choose_carriers,
    count_types,
    expert_blocks,
    version_of,
)
from moeq.formats.compressed_tensors_config import label, quantization_config
from moeq.formats.compressed_tensors_float import declared_tensors, float_tensors
from moeq.formats.format import Format, FormatReport
from moeq.formats.hf_folder import (
    Piece,
    check_pieces,
    check_values,
    fill_folder,
    kept_pieces,
    report,
    unreadable_draft,
)
from moeq.formats.source import PackedExport
from moeq.models.adapter import find_blocks
from moeq.quant.carrier import MERGED_LINEARS, Carrier, CarrierMode, FormatName, recentre
from moeq.quant.packing import num_words
from moeq.quant.spec import QuantizedWeight

_NAME: FormatName = "compressed-tensors"
_REASON = "vLLM and SGLang read these weights in one way"
# transformers reads the key before it reads weights, and stops with its text.
_BARRIER = "transformers_weights"
_REMEDY = "serve the folder with vLLM or SGLang"
_ONE_SCHEME = "reads one scheme for all experts of a model"
_NO_GLOBALS = "leaves out the global scales of experts in NVFP4"


def check(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> None:
    """Raise ValueError where vLLM and SGLang would read a model on these grids wrongly or not at all."""
    _carriers(model, grids, mode)


def write(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> None:
    """Fill an empty folder; see ``Format``."""
    carriers = _carriers(export.model, export.grids, mode)
    config: dict[str, Any] = json.loads(json.dumps(export.config))
    dropped = unreadable_draft(export, config)
    kept = kept_pieces(export, dropped)
    config["quantization_config"] = quantization_config(
        carriers,
        {name: sorted({name, export.key(name)}) for name in carriers},
        [*_matrices(kept), *_kept_modules(export)],
        _block_paths(export),
    )
    misread = _misread_by_transformers(export.model, carriers)
    if misread is not None:
        config[_BARRIER] = f"none. transformers {misread} and would read these wrongly: {_REMEDY}"
    pieces = kept + [_piece(export, names, carriers[names[0]]) for names in _read_together(carriers)]
    fill_folder(export, folder, pieces, config, _card(carriers, misread, bool(dropped)), progress)


def verify(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> FormatReport:
    """Read the folder back by compressed-tensors, which looks up the scheme of each weight in its configuration too."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    stored, linear = raw_tensors(folder), nn.Linear(1, 1, device="meta")

    def scheme(key: str) -> Any:
        groups = [g for g in theirs.config_groups.values() if is_match(key, linear, g.targets, theirs.ignore or ())]
        return groups[0] if len(groups) == 1 else None

    carriers = _carriers(export.model, export.grids, mode)
    names = list(carriers)
    for index in progress(range(len(names)), "reading"):
        key = export.key(names[index])
        parts = {k.rpartition(".")[2]: t for k, t in _parts(stored, key).items()}
        found = scheme(key)
        raise_for(folder, "schemes", [] if found is not None and found == scheme(names[index]) else [key])
        compressor = BaseCompressor.get_value_from_registry(found.format)
        check_values(folder, key, compressor.decompress(parts, found)["weight"], export.weight(names[index]))
    kept = kept_pieces(export, unreadable_draft(export, {}))
    raise_for(folder, "kept weights", sorted(key for key in _matrices(kept) if scheme(key) is not None))
    num_bits, num_weights = _size(export, carriers)
    return report(
        folder, _NAME, version_of(_NAME),
        types=count_types(label(carrier) for carrier in carriers.values()),
        num_other=check_pieces(folder, kept), num_bits=num_bits, num_weights=num_weights, largest_error=0.0,
    )  # fmt: skip


def serve(folder: Path) -> str:
    """The command that serves a folder."""
    return f"vllm serve {folder}"


def _carriers(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> dict[str, Carrier]:
    carriers = choose_carriers(_NAME, model, grids, mode)
    check_experts_apart(model, carriers, _NAME)
    for unit in expert_blocks(model):
        check_alike(carriers, unit, _REASON)
    for names in _merged(weight_names(model)):
        check_alike(carriers, names, _REASON)
    return carriers


def _merged(names: Iterable[str]) -> list[list[str]]:
    """Weights that vLLM and SGLang make one of; the others alone."""
    merged: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        merged.setdefault((parent, MERGED_LINEARS.get(leaf, leaf)), []).append(name)
    return list(merged.values())


def _read_together(carriers: Mapping[str, Carrier]) -> list[list[str]]:
    """Weights with tensors that depend on each other: those that share a global scale."""
    shared = _merged(name for name, carrier in carriers.items() if carrier.kind == "nvfp4")
    return [*([name] for name, carrier in carriers.items() if carrier.kind != "nvfp4"), *shared]


def _misread_by_transformers(model: PreTrainedModel, carriers: Mapping[str, Carrier]) -> str | None:
    """Why transformers would open the folder and read experts wrongly; None where it reads them rightly."""
    found = {carriers.get(name) for unit in expert_blocks(model) for name in unit}
    if len(found) > 1 or None in found:
        return _ONE_SCHEME
    return _NO_GLOBALS if any(carrier is not None and carrier.kind == "nvfp4" for carrier in found) else None


def _kept_modules(export: PackedExport) -> list[str]:
    """Names in the model of modules whose weight is not quantized; files may have other names for them."""
    others = [name.removesuffix(".weight") for name in export.other_names if name.endswith(".weight")]
    matrices = [name for name in others if export.model.get_parameter(f"{name}.weight").ndim > 1]
    return [*matrices, *(name for name in export.weight_names if name not in export.grids)]


def _matrices(pieces: Iterable[Piece]) -> list[str]:
    """Names of modules whose weight, which stays as it is, has rows and columns."""
    declared = {key: tensor for piece in pieces for key, tensor in piece.declared.items()}
    return [key.removesuffix(".weight") for key, tensor in declared.items() if len(tensor.shape) > 1]


def _piece(export: PackedExport, names: list[str], carrier: Carrier) -> Piece:
    name, shapes = names[0], {export.key(name): export.shape(name) for name in names}
    if carrier.kind != "uniform":
        declared: dict[str, Declared] = {}
        for key, shape in shapes.items():
            declared |= declared_tensors(key, shape, carrier)
        return Piece(declared, lambda: float_tensors({export.key(name): export.quantized(name) for name in names}))
    ((key, (rows, columns)),) = shapes.items()
    groups = 1 if carrier.group_size is None else columns // carrier.group_size
    declared = {
        f"{key}.weight_packed": Declared(torch.int32, (rows, num_words(columns, carrier.bits))),
        f"{key}.weight_scale": Declared(export.dtype(name), (rows, groups)),
        f"{key}.weight_shape": Declared(torch.int64, (2,)),
    }
    if carrier.zero_point == "integer":
        declared[f"{key}.weight_zero_point"] = Declared(torch.int32, (num_words(rows, carrier.bits), groups))
    return Piece(declared, lambda: _tensors(export.quantized(name), key, carrier))


def _tensors(weight: QuantizedWeight, key: str, carrier: Carrier) -> dict[str, Tensor]:
    if carrier.zero_point == "middle":
        weight = recentre(weight, carrier.bits)
    return {f"{key}.{part}": tensor for part, tensor in packed_tensors(weight).items()}


def _parts(stored: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    leaves = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
    return {f"{key}.{leaf}": stored[f"{key}.{leaf}"].read() for leaf in leaves if f"{key}.{leaf}" in stored}


def _block_paths(export: PackedExport) -> list[str]:
    """Paths of the list of blocks: in the model, and in the files."""
    path = find_blocks(export.model)[0]
    keys = [export.key(name) for name in export.grids if name.startswith(f"{path}.")]
    leaf = path.rpartition(".")[2]
    return sorted({path, *(key.partition(f"{leaf}.")[0] + leaf for key in keys if f"{leaf}." in key)}, key=len)[::-1]


def _size(export: PackedExport, carriers: Mapping[str, Carrier]) -> tuple[int, int]:
    shapes = {name: export.shape(name) for name in carriers}
    bits = sum(carriers[name].num_bits(*shape) for name, shape in shapes.items())
    return bits, sum(rows * columns for rows, columns in shapes.values())


def _card(carriers: Mapping[str, Carrier], misread: str | None, dropped: bool) -> Card:
    opening = f"```sh\nvllm serve {_NAME}\npython -m sglang.launch_server --model-path {_NAME}\n```"
    limits = () if misread is None else (f"transformers, which refuses it: it {misread}.",)
    return Card(
        format=_NAME,
        library="transformers",
        opening=opening,
        types=count_types(label(carrier) for carrier in carriers.values()),
        limits=limits,
        left_out="draft layers, which the source holds in a format of its own" if dropped else None,
    )


FORMAT = Format(_NAME, check, write, verify, serve)
