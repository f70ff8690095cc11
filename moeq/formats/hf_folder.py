"""Hugging Face folders of runtimes, made of a packed export: one piece of tensors after another, and what is no weight.

What a format does not make anew is copied byte by byte from the files of the packed export, and compared with them when
the folder is read back.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.sources import raw_tensors
from moeq.disk.atomic import write_text
from moeq.disk.folder import MANIFEST, write_manifest
from moeq.disk.tensor_file import Declared
from moeq.export.carried import is_draft
from moeq.export.companions import copy_companions
from moeq.export.compare import raise_for
from moeq.export.config_file import announce_no_draft
from moeq.export.finished import Progress
from moeq.export.layout import layout_writer, plan_keys
from moeq.formats.card import Card, write_card
from moeq.formats.format import FormatReport
from moeq.formats.source import PackedExport
from moeq.models.experts import expert_modules, parameter_name

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Piece:
    """Tensors of a file that are made together.

    Attributes:
        declared: Dtype and shape of each by key.
        make: Their values by key; called once, when they are written.
    """

    declared: Mapping[str, Declared]
    make: Callable[[], Mapping[str, Tensor]]


def copied(key: str, tensor: Readable) -> Piece:
    """A tensor of the packed export under a key of its own."""
    return Piece({key: Declared(tensor.dtype, tensor.shape)}, lambda: {key: tensor.read()})


def renamed(piece: Piece, key_of: Callable[[str], str]) -> Piece:
    """A piece under other keys."""
    declared = {key_of(key): tensor for key, tensor in piece.declared.items()}
    return Piece(declared, lambda: {key_of(key): tensor for key, tensor in piece.make().items()})


def kept_pieces(export: PackedExport, without: Collection[str] = ()) -> list[Piece]:
    """Everything in the packed export's files that is no part of a quantized weight, under the keys of the source.

    Args:
        export: The packed export.
        without: Keys of its files that are left out.
    """
    fused = {
        f"{path}.{parameter_name(module, part)}"
        for path, module in expert_modules(export.model).items()
        for part in ("into", "down")
    }
    pieces = []
    for key, tensor in export.contents.stored.items():
        name = export.contents.parameter_of.get(key, "")
        if key in without or _is_part(export, name):
            continue
        pieces.append(_as_in_source(export, name, tensor) if name in fused else copied(key, tensor))
    return pieces


def carried_keys(export: PackedExport) -> list[str]:
    """Keys of what the packed export carries of its source: no parameter is made of it."""
    return [key for key in export.contents.stored if key not in export.contents.parameter_of]


def unreadable_draft(export: PackedExport, config: dict[str, Any]) -> list[str]:
    """Keys of draft layers that a runtime would not read beside other quantized weights: the source quantized them.

    Where there are such, the configuration no longer announces draft layers.

    Args:
        export: The packed export.
        config: Of the folder that is written; edited.
    """
    num_blocks = int(export.model.config.get_text_config().num_hidden_layers)
    draft = [key for key in carried_keys(export) if is_draft(key, num_blocks)]
    if all(export.contents.stored[key].dtype in _PLAIN for key in draft):
        return []
    announce_no_draft(config)
    return draft


def fill_folder(
    export: PackedExport,
    folder: Path,
    pieces: Sequence[Piece],
    config: Mapping[str, Any],
    card: Card,
    progress: Progress,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write weights, configuration, companions, card and manifest into an empty folder.

    Args:
        export: What the folder is made of.
        folder: Empty.
        pieces: Of the weight files; one of them is in memory at a time.
        config: Of ``config.json``.
        card: What the model card says of the format.
        progress: Shows how many pieces are written.
        texts: Further files, by name.

    Raises:
        ValueError: Two pieces declare one key, or the disk does not take a file.
    """
    declared: dict[str, Declared] = {}
    for piece in pieces:
        if twice := declared.keys() & piece.declared.keys():
            raise ValueError(
                f"{min(twice)} would be written twice; the names of the family's files are not those known"
            )
        declared |= piece.declared
    with layout_writer(folder, plan_keys(export.model, declared)) as writer:
        for index in progress(range(len(pieces)), "writing"):
            writer.write(pieces[index].make().items())
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    copy_companions(export.folder, folder)
    for name, text in (texts or {}).items():
        write_text(folder / name, text)
    write_card(export, folder, card)
    made_of = json.loads((export.folder / MANIFEST).read_text(encoding="utf8"))
    write_manifest(folder, {**{k: v for k, v in made_of.items() if k != "files"}, "kind": card.format})


def check_pieces(folder: Path, pieces: Iterable[Piece]) -> int:
    """Compare tensors of a folder, byte by byte, with what they were made of; returns how many there are.

    Args:
        folder: That was written.
        pieces: Tensors that are not quantized, made of the packed export once more.

    Raises:
        ExportMismatchError: One is missing or differs.
    """
    stored, differing, count = raw_tensors(folder), [], 0
    for piece in pieces:
        for key, theirs in piece.make().items():
            ours = stored[key].read() if key in stored else None
            equal = ours is not None and ours.dtype == theirs.dtype and ours.shape == theirs.shape
            differing += [] if ours is not None and equal and _same_bytes(ours, theirs) else [key]
            count += 1
    raise_for(folder, "tensors", sorted(differing))
    return count


def check_values(folder: Path, name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise ExportMismatchError where a weight that was read back is not the packed export's, bit for bit.

    Args:
        folder: That was written.
        name: Of the weight.
        ours: As it was read, in float32 or in the dtype of the model.
        theirs: Of the packed export.
    """
    raise_for(folder, "weights", [] if torch.equal(ours.to(theirs.dtype), theirs) else [name])


def report(
    folder: Path,
    name: str,
    reader: str,
    *,
    types: Mapping[str, int],
    num_other: int,
    num_bits: int,
    num_weights: int,
    largest_error: float,
    num_left_out: int = 0,
) -> FormatReport:
    """What was found in a folder.

    Args:
        folder: That was read.
        name: Of the format.
        reader: What read it.
        types: How many quantized weights have which type.
        num_other: Other tensors that were compared.
        num_bits: Of all quantized weights in the files.
        num_weights: Their elements.
        largest_error: In scales.
        num_left_out: Tensors of the packed export that the folder does not hold.
    """
    return FormatReport(
        format=name,
        path=str(folder),
        reader=reader,
        num_quantized=sum(types.values()),
        num_other=num_other,
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        bits_per_weight=num_bits / num_weights,
        types=dict(types),
        largest_error=largest_error,
        num_left_out=num_left_out,
    )


def _is_part(export: PackedExport, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in _PARTS and owner in export.grids


def _as_in_source(export: PackedExport, name: str, tensor: Readable) -> Piece:
    """Kept experts of a block as the family's files hold them, which may be one by one."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    declared = {
        key: Declared(part.dtype, tuple(part.shape))
        for key, part in revert_weight_conversion(export.model, {name: empty}).items()
    }
    return Piece(declared, lambda: revert_weight_conversion(export.model, {name: tensor.read()}))


def _same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    one, other = (each.contiguous().flatten().view(torch.uint8) for each in (ours, theirs))
    return torch.equal(one, other)
