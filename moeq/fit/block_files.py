"""Finished blocks of a run on disk, the home of their codes: packed codes, changed parameters, records.

A killed run continues from them, and exports are made of them.  Each block is one file with a checksum of every tensor
and of its records; one that is not what was written is told from one of another run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moeq.disk.checked import read_checked, write_checked
from moeq.fit.run import Run
from moeq.quant.packing import pack, unpack
from moeq.quant.spec import Fallback, QuantizedWeight

# Bits and group size of a weight.
Grid = tuple[int, int | None]
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
        """Bits and group size of its weights, by canonical name."""
        return {name: (bits, group_size) for name, (bits, group_size, _) in self.records["grids"].items()}

    @property
    def changed(self) -> dict[str, Tensor]:
        """Its changed parameters that are not quantized, by name in the model."""
        return {key.removeprefix(_CHANGED): value for key, value in self.tensors.items() if key.startswith(_CHANGED)}

    def without_codes(self) -> "BlockFile":
        """The same without its quantized weights, in memory."""
        kept = {key: v.clone() for key, v in self.tensors.items() if key.startswith((_CHANGED, _USAGE))}
        return replace(self, tensors=kept)

    def __getitem__(self, name: str) -> QuantizedWeight:
        bits, group_size, num_columns = self.records["grids"][name]
        zero_point_OG = self.tensors.get(f"{name}.zero_point")
        codes_OI = unpack(self.tensors[f"{name}.packed"], bits, num_columns)
        return QuantizedWeight(codes_OI, self.tensors[f"{name}.scale"], zero_point_OG, bits, group_size)

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
    chosen = set(names)
    # All of it: a survey, which a resumed run does not repeat, has counted the blocks to come as well.
    tensors |= {f"{_USAGE}{path}": counts for path, counts in run.usage.items()}
    records = {
        "fingerprint": fingerprint,
        "grids": {n: [(w := run.quantized[n]).bits, w.group_size, w.codes_OI.shape[1]] for n in names},
        "reasons": {name: run.reasons[name] for name in changed if name in run.reasons},
        "errors": [row for row in run.errors if row["weight"] in chosen],
        "fallbacks": [asdict(fallback) for fallback in run.fallbacks if fallback.weight in chosen],
    }
    write_checked(block_path(folder, block), tensors, {RECORDS: json.dumps(records)})


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
