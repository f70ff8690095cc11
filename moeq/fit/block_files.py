"""Finished blocks of a run on disk, from which a killed run continues: codes, changed parameters, records.

Each block is one file with a checksum of every tensor and of its records; one that is not what was written is told
from one of another run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moeq.disk.checked import read_checked, write_checked
from moeq.fit.run import Run
from moeq.quant.spec import Fallback, QuantizedWeight

RECORDS = "moeq"
_REMEDY = "the block is quantized again"


@dataclass(frozen=True)
class BlockFile:
    """What a file holds: tensors by name, and fingerprint, grids, errors and fallbacks."""

    path: Path
    tensors: Mapping[str, Tensor]
    records: Mapping[str, Any]


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
    tensors: dict[str, Tensor] = {f"changed:{name}": run.changed[name] for name in changed}
    for name in names:
        weight = run.quantized[name]
        tensors |= {f"{name}.codes": weight.codes_OI, f"{name}.scale": weight.scale_OG}
        if weight.zero_point_OG is not None:
            tensors[f"{name}.zero_point"] = weight.zero_point_OG
    chosen = set(names)
    # All of it: a survey, which a resumed run does not repeat, has counted the blocks to come as well.
    tensors |= {f"usage:{path}": counts for path, counts in run.usage.items()}
    records = {
        "fingerprint": fingerprint,
        "grids": {n: [run.quantized[n].bits, run.quantized[n].group_size] for n in names},
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


def check_fingerprint(file: BlockFile, fingerprint: Mapping[str, str]) -> None:
    """Raise ValueError where a block was made with another configuration, model or data, naming which."""
    before = file.records["fingerprint"]
    if changed := [key for key, value in fingerprint.items() if before.get(key) != value]:
        raise ValueError(
            f"{file.path.parents[1]} holds blocks of a run with another {' and '.join(changed)}; "
            "set --trainer.default_root_dir to a new folder, or --model.restart true to start over in this one"
        )


def take_block(file: BlockFile, run: Run) -> list[str]:
    """Enter a finished block into the run; returns the names of its weights."""
    tensors = file.tensors
    for name, (bits, group_size) in file.records["grids"].items():
        run.quantized[name] = QuantizedWeight(
            tensors[f"{name}.codes"], tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point"), bits, group_size
        )
    run.usage |= {key.removeprefix("usage:"): counts for key, counts in tensors.items() if key.startswith("usage:")}
    run.changed |= {key.removeprefix("changed:"): value for key, value in tensors.items() if key.startswith("changed:")}
    run.errors += file.records["errors"]
    run.fallbacks += [Fallback(**fallback) for fallback in file.records["fallbacks"]]
    return list(file.records["grids"])
