"""MLX: a folder for mlx-lm, whose experts are one tensor for each projection of a block.

``weight`` (uint32, the codes as one stream of bits), ``scales`` and ``biases`` in the dtype of the model, which mean
``code * scale + bias``.  "exact" writes codes whose zero is in the middle of their range, so that the bias is a power
of two times the scale and nothing is rounded; "native" keeps each weight's own width, and rounds the biases of those
that have zero points.

What mlx-lm's classes do not read is left out: draft layers, which the configuration no longer announces.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.disk.tensor_file import Declared
from moeq.export.config_file import announce_no_draft
from moeq.export.finished import Progress
from moeq.formats.card import Card
from moeq.formats.carriers import check_alike, choose_carriers, count_types, expert_blocks
from moeq.formats.format import Format, FormatReport
from moeq.formats.hf_folder import Piece, check_pieces, fill_folder, kept_pieces, renamed, report
from moeq.formats.language_model import left_out
from moeq.formats.mlx_config import completed
from moeq.formats.mlx_family import MlxFamily
from moeq.formats.mlx_known import check_norms, find_family
from moeq.formats.mlx_modules import Held, find_modules, merged_units, renamed_path
from moeq.formats.mlx_pieces import changed, dense_piece, quantized_piece
from moeq.formats.mlx_reader import check_modules
from moeq.formats.source import PackedExport
from moeq.quant.carrier import Carrier, CarrierMode

_REASON = "MLX holds all experts of a projection of a block in one tensor"
_MERGED = "they are one linear of mlx-lm's class"
_TEXT_ALONE = "Images and sound: the folder holds the language model alone, which is what mlx-lm reads."
_NORMS = "Exact agreement with what was measured: norms are 1 + weight, and rounded to the dtype of the files."
_APART = "dequantized (mlx-lm takes it apart)"


def check(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> None:
    """Raise ValueError where mlx-lm would read a model on these grids wrongly or not at all."""
    _carriers(model, grids, mode)


def write(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> None:
    """Fill an empty folder; see ``Format``."""
    family, carriers = find_family(export.model), _carriers(export.model, export.grids, mode)
    modules = find_modules(export, family)
    pieces = _kept(export, family, carriers, modules)
    for path, held in modules.items():
        if held.names[0] in carriers:
            pieces.append(quantized_piece(export, path, held, carriers[held.names[0]]))
    model, own_head = export.model, _has_head(export.model)
    if not family.has_tied_head and not own_head:
        inside = family.language_model and not family.written_as
        pieces.append(_untied_head(export, "language_model.lm_head" if inside else "lm_head"))
    has_head = own_head or not family.has_tied_head
    config = completed(json.loads(json.dumps(export.config)), model.config, family, has_head=has_head)
    announce_no_draft(config)
    quantization = _quantization(modules, carriers)
    config |= {"quantization": quantization, "quantization_config": quantization}
    fill_folder(export, folder, pieces, config, _card(export, carriers), progress)


def verify(export: PackedExport, folder: Path, mode: CarrierMode, progress: Progress) -> FormatReport:
    """Read the folder back by MLX in float32, or in numpy where MLX is not installed (it does not run everywhere)."""
    family, carriers = find_family(export.model), _carriers(export.model, export.grids, mode)
    modules = find_modules(export, family)
    quantized = {path: held for path, held in modules.items() if held.names[0] in carriers}
    found = check_modules(export, folder, quantized, mode, progress)
    num_other = check_pieces(folder, _kept(export, family, carriers, modules))
    num_bits = num_weights = 0
    for name in export.grids:
        rows, columns = export.shape(name)
        num_weights += rows * columns
        dense = 8 * export.dtype(name).itemsize * rows * columns
        num_bits += carriers[name].num_bits(rows, columns) if name in carriers else dense
    return report(
        folder, "mlx", found.reader,
        types=count_types(_label(carriers.get(name)) for name in export.grids), num_other=num_other,
        num_bits=num_bits, num_weights=num_weights, largest_error=found.largest_error,
        num_left_out=len(left_out(export)),
    )  # fmt: skip


def serve(folder: Path) -> str:
    """The command that generates with a folder."""
    return f"mlx_lm.generate --model {folder} --prompt Hello"


def _carriers(model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode) -> dict[str, Carrier]:
    """Storage types of the weights that stay quantized."""
    family = find_family(model)
    check_norms(model, family, mode)
    carriers = choose_carriers("mlx", model, grids, mode)
    for unit in expert_blocks(model):
        for leaf in dict.fromkeys(name.rpartition(".")[2] for name in unit):
            check_alike(carriers, [name for name in unit if name.endswith(f".{leaf}")], _REASON)
    for unit in merged_units(model, family):
        check_alike(carriers, unit, _MERGED)
    return {name: c for name, c in carriers.items() if name.rpartition(".")[2] not in family.taken_apart}


def _kept(
    export: PackedExport, family: MlxFamily, carriers: Mapping[str, Carrier], modules: Mapping[str, Held]
) -> list[Piece]:
    """Everything that is not quantized there: experts as stacks, linears that are taken apart by their values."""
    made: list[Piece] = []
    taken: list[str] = []
    for path, held in modules.items():
        if held.names[0] in carriers or (held.is_whole and held.names[0] not in export.grids):
            continue
        taken += held.names
        made.append(dense_piece(export, path, held))
    others = kept_pieces(export, without=[*left_out(export), *export.keys_of(taken)])
    config = export.model.config.get_text_config()
    return made + [changed(renamed(piece, lambda key: renamed_path(key, family, config)), family) for piece in others]


def _has_head(model: PreTrainedModel) -> bool:
    """Whether its head is not the embedding."""
    return model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def _untied_head(export: PackedExport, path: str) -> Piece:
    """The embedding once more, as the head of a class that has no tied one."""
    names = {id(tensor): name for name, tensor in export.model.named_parameters()}
    embedding = names[id(export.model.get_input_embeddings().weight)]
    stored = export.contents.stored[export.key(embedding)]
    key = f"{path}.weight"
    return Piece({key: Declared(stored.dtype, stored.shape)}, lambda: {key: stored.read()})


def _quantization(modules: Mapping[str, Held], carriers: Mapping[str, Carrier]) -> dict[str, Any]:
    """``quantization`` of config.json: the most frequent type, and every module that has another, or none."""
    types = {path: carriers.get(held.names[0]) for path, held in modules.items()}
    first = Counter(carrier for carrier in types.values() if carrier is not None).most_common(1)[0][0]
    others = {path: carrier and _as_read(carrier) for path, carrier in types.items() if carrier != first}
    return {**_as_read(first), **{path: values or False for path, values in others.items()}}


def _as_read(carrier: Carrier) -> dict[str, Any]:
    return {"group_size": carrier.group_size, "bits": carrier.bits, "mode": "affine"}


def _label(carrier: Carrier | None) -> str:
    return _APART if carrier is None else f"{carrier.bits} bits, groups of {carrier.group_size}"


def _card(export: PackedExport, carriers: Mapping[str, Carrier]) -> Card:
    left = left_out(export)
    return Card(
        format="mlx",
        library="mlx",
        opening='```sh\nmlx_lm.generate --model mlx --prompt "Hello"\nmlx_lm.server --model mlx\n```',
        types=count_types(_label(carriers.get(name)) for name in export.grids),
        limits=_limits(export),
        left_out=f"{len(left)} tensors that mlx-lm does not read, draft layers among them" if left else None,
    )


def _limits(export: PackedExport) -> tuple[str, ...]:
    family = find_family(export.model)
    limits = (_TEXT_ALONE,) if family.language_model else ()
    return (
        (*limits, _NORMS) if (family.one_added or family.adds_one) and export.model.dtype != torch.float32 else limits
    )


FORMAT = Format("mlx", check, write, verify, serve)
