"""Token ids from a file: a calibration set that was written before, or elsewhere.

    .safetensors    a tensor ``input_ids`` [N, L] (or ``ids_NT``, as in the sets of a run folder)
    .npy            an array [N, L]
    .jsonl          one list of ids per line, or one object with the field "input_ids"

All sequences have one length: padding would calibrate on tokens that nobody wrote.  Legend: N sequences, L tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FIELDS = ("input_ids", "ids_NT")
MASK = "attention_mask"


def read_ids(path: Path) -> Tensor:
    """int64 ids_NL of a file.

    Raises:
        ValueError: The file is missing, damaged, of another kind or empty, has padding, sequences of several lengths,
            or numbers that are no integers.
    """
    readers = {".safetensors": _from_safetensors, ".npy": _from_numpy, ".jsonl": _from_lines}
    if path.suffix not in readers:
        raise ValueError(f"file of token ids {path} must end in {', '.join(readers)}; convert it to one of them")
    if not path.is_file():
        raise ValueError(f"no file {path.name} in folder {path.parent}; it should contain token ids; check the path")
    ids_NL = readers[path.suffix](path)
    if ids_NL.dtype == torch.bool or ids_NL.is_floating_point() or ids_NL.is_complex():
        raise ValueError(f"token ids of {path} are {ids_NL.dtype}; they must be integers; write them as int32 or int64")
    if ids_NL.ndim != 2 or not ids_NL.numel():
        raise ValueError(f"token ids of {path} have shape {tuple(ids_NL.shape)}; give [sequences, length], none empty")
    return ids_NL.to(torch.int64)


def check_ids(ids_NL: Tensor, source: str, vocabulary: int) -> None:
    """Raise ValueError where an id is not one of the ``vocabulary`` ids of the model, 0 to vocabulary - 1."""
    wrong = (ids_NL < 0) | (ids_NL >= vocabulary)
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{source} has {int(wrong.sum())} ids that are no tokens of the model, first {int(ids_NL[row, position])} "
            f"at position {position} of sequence {row}; ids go from 0 to {vocabulary - 1}; use the model's tokenizer"
        )


def _from_safetensors(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete file of tensors ({error}); copy it again") from error
    if MASK in tensors and not bool(tensors[MASK].all()):
        raise ValueError(_padding(path, int((tensors[MASK] == 0).sum())))
    found = next((name for name in FIELDS if name in tensors), None)
    if found is None:
        raise ValueError(f"{path} has tensors {sorted(tensors)}; token ids must be named {FIELDS[0]}; rename them")
    return tensors[found]


def _from_numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a complete array of numbers ({error}); write it with numpy.save") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"token ids of {path} are {array.dtype}; they must be integers; write them as int32 or int64")
    return torch.from_numpy(array.astype(np.int64))


def _from_lines(path: Path) -> Tensor:
    rows: list[list[int]] = []
    with path.open(encoding="utf8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_row(line, f"{path}, line {number}"))
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"sequences of {path} have {lengths[0]} to {lengths[-1]} ids; all must have one length, as padding would "
            f"be calibrated on; cut them to {lengths[0]}"
        )
    return torch.tensor(rows, dtype=torch.int64)


def _row(line: str, where: str) -> list[int]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); write one list of token ids per line") from error
    if isinstance(row, dict):
        if 0 in row.get(MASK, ()):
            raise ValueError(_padding(where, row[MASK].count(0)))
        row = row.get(FIELDS[0])
    if not isinstance(row, list) or not row:
        raise ValueError(f'{where} has no list of token ids; write [1, 2, 3] or {{"input_ids": [1, 2, 3]}}')
    if wrong := [token for token in row if type(token) is not int]:
        raise ValueError(f"{where} has {wrong[0]!r}, which is no token id; write integers")
    if max(map(abs, row)) >= 2**63:
        raise ValueError(f"{where} has {max(row, key=abs)}, which is no token id; write those of the model's tokenizer")
    return row


def _padding(where: Path | str, num_masked: int) -> str:
    return (
        f"{where} has an {MASK} that leaves out {num_masked} tokens; sequences must be whole, as padding would be "
        "calibrated on; cut all to one length and leave the mask out"
    )
