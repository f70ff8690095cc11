"""Finished blocks of a run on disk, the home of their codes: packed codes, changed parameters, records.

A killed run continues from them, and exports are made of them.  Each block is one file with a checksum of every tensor
and of its records; one that is not what was written is told from one of another run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.disk.checked import read_checked, write_checked
from moeq.fit.run import Run
from moeq.quant.kinds import StoredKind
from moeq.quant.packing import pack, unpack
from moeq.quant.spec import Fallback, QuantizedWeight, SuperScales

# Bits, group size and kind of what is stored of a weight.
Grid = tuple[int, int | None, StoredKind]
RECORDS = "moeq"
_CHANGED, _USAGE = "changed:", "usage:"
_REMEDY = "the block is quantized again"


@dataclass(frozen=True)
class BlockFile(Mapping[str, QuantizedWeight]):
    """What a file holds: tensors by name, and fingerprint, grids, errors and fallbacks.

    As a mapping, its quantized weights by canonical name; codes are unpacked for each that is asked for.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    records: Mapping[str, Any]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the block depends on, by subject."""
        return dict(self.records["fingerprint"])

    @property
    def grids(self) -> dict[str, Grid]:
        """Grids of its weights, by canonical name."""
        of_weight = self.records["grids"].items()
        return {name: (bits, size, kind[0] if kind else "uniform") for name, (bits, size, _, *kind) in of_weight}

    @property
    def changed(self) -> dict[str, Tensor]:
        """Its changed parameters that are not quantized, by name in the model."""
        return {key.removeprefix(_CHANGED): value for key, value in self.tensors.items() if key.startswith(_CHANGED)}

    def without_codes(self) -> "BlockFile":
        """The same without its quantized weights, in memory."""
        kept = {key: v.clone() for key, v in self.tensors.items() if key.startswith((_CHANGED, _USAGE))}
        return replace(self, tensors=kept)

    def __getitem__(self, name: str) -> QuantizedWeight:
        bits, group_size, num_columns, *kinds = self.records["grids"][name]
        zero_point_OG = self.tensors.get(f"{name}.zero_point")
        codes_OI, supers = unpack(self.tensors[f"{name}.packed"], bits, num_columns), None
        if len(kinds) == 2:
            kind, dtype = kinds
            parts = self.tensors[f"{name}.super_scale"], self.tensors.get(f"{name}.super_min")
            supers = SuperScales(kind, *parts, getattr(torch, dtype))
        table = kinds[0] if len(kinds) == 1 else None
        return QuantizedWeight(codes_OI, self.tensors[f"{name}.scale"], zero_point_OG, bits, group_size, supers, table)

    def __contains__(self, name: object) -> bool:
        return name in self.records["grids"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records["grids"])

    def __len__(self) -> int:
        return len(self.records["grids"])


def block_path(folder: Path, block: int) -> Path:
    """File of one finished block in a run folder."""
    return folder / "blocks" / f"block_{block:03d}.safetensors"


def save_block(
    folder: Path, block: int, run: Run, names: Sequence[str], changed: Sequence[str], fingerprint: Mapping[str, str]
) -> None:
    """Write a finished block: its quantized weights, changed parameters, errors, fallbacks and usage.

    Args:
        folder: Of the run.
        block: Index of the block.
        run: Holds what is written.
        names: Canonical names of the weights of the block.
        changed: Names of its changed parameters.
        fingerprint: What the block depends on, by subject.

    Raises:
        ValueError: The disk does not take the file.
    """
    tensors: dict[str, Tensor] = {f"{_CHANGED}{name}": run.changed[name] for name in changed}
    for name in names:
        weight = run.quantized[name]
        tensors |= {f"{name}.packed": pack(weight.codes_OI, weight.bits), f"{name}.scale": weight.scale_OG}
        if weight.zero_point_OG is not None:
            tensors[f"{name}.zero_point"] = weight.zero_point_OG
        if (supers := weight.super_scales) is not None:
            tensors[f"{name}.super_scale"] = supers.scale_OB
            tensors |= {} if supers.min_OB is None else {f"{name}.super_min": supers.min_OB}
    chosen = set(names)
    # All of it: a survey, which a resumed run does not repeat, has counted the blocks to come as well.
    tensors |= {f"{_USAGE}{path}": counts for path, counts in run.usage.items()}
    records = {
        "fingerprint": fingerprint,
        "grids": {name: _record(run.quantized[name]) for name in names},
        "reasons": {name: run.reasons[name] for name in changed if name in run.reasons},
        "errors": [row for row in run.errors if row["weight"] in chosen],
        "fallbacks": [asdict(fallback) for fallback in run.fallbacks if fallback.weight in chosen],
    }
    write_checked(block_path(folder, block), tensors, {RECORDS: json.dumps(records)})


def _record(weight: QuantizedWeight) -> list[Any]:
    """Grid and columns of a weight; its kind, too, where it is a table, or two-level with the dtype of its values."""
    told = [weight.bits, weight.group_size, weight.codes_OI.shape[1]]
    if weight.table is not None:
        return [*told, weight.table]
    return told if weight.super_scales is None else [*told, weight.kind, str(weight.dtype).removeprefix("torch.")]


def read_block(folder: Path, block: int) -> BlockFile:
    """Read the file of a finished block.

    Raises:
        ValueError: It is truncated or damaged.
    """
    path = block_path(folder, block)
    metadata, tensors = read_checked(path, _REMEDY)
    return BlockFile(path, tensors, json.loads(metadata[RECORDS]))


def check_fingerprint(folder: Path, held: str, before: Mapping[str, str], fingerprint: Mapping[str, str]) -> None:
    """Refuse a folder with something of a run with another configuration, model or data.

    Args:
        folder: Of the run.
        held: What there is of the other one.
        before: Its fingerprint.
        fingerprint: That of this run, or what is known of it.

    Raises:
        ValueError: They differ; it names in what.
    """
    if changed := [key for key, value in fingerprint.items() if before.get(key) != value]:
        raise ValueError(
            f"{folder} holds {held} of a run with another {' and '.join(changed)}; "
            "set --trainer.default_root_dir to a new folder, or --model.restart true to start over in this one"
        )


def take_records(file: BlockFile, run: Run) -> None:
    """Enter what is known of a finished block into the run: usage, changed parameters and why, errors, fallbacks."""
    run.usage |= {key.removeprefix(_USAGE): counts for key, counts in file.tensors.items() if key.startswith(_USAGE)}
    run.changed |= file.changed
    run.reasons |= file.records["reasons"]
    run.errors += file.records["errors"]
    run.fallbacks += [Fallback(**fallback) for fallback in file.records["fallbacks"]]
