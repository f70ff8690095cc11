"""What the steps of a run share: one dataclass, and the files of the run folder.

Callbacks never read each other; they read and write a ``Run``.  Every file is written under a temporary name and
renamed, so that a killed run leaves no half-written file.
"""

import csv
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeq.allocation.evidence import Evidence, Promise
from moeq.quant.hessian import HessianState
from moeq.quant.spec import Fallback, GridSpec, QuantizedWeight


@dataclass
class Run:
    """State of one quantization run.

    Attributes:
        plan: Grid of every weight, by canonical name.
        hessians: Hessian statistics of the current pass, by site name: of the experts of the pass's part of the site.
        pools: Their sums over all experts of the site (E = 1), for sites with several; kept until its last chunk.
        usage: Tokens routed to each expert, int64 [E], by path of the experts module.
        quantized: Quantized weights so far, on the CPU, by canonical name.
        offsets: Where the weights of the current block lie in the cells of their codes; None where no step asked.
        changed: Unquantized parameters that were changed (norms, routers), on the CPU, by their name in the model.
        errors: One row per quantized weight: weight, block, kind, linear, bits, relative_error.
        fallbacks: Everything that was not done as asked.
        seconds: Wall time by step.
        promised: What a survey of the original model will find; None where no step makes one.
        survey_needed: Whether a step of this run decides from it.
        evidence: What it found; None before its end.
    """

    plan: dict[str, GridSpec] = field(default_factory=dict)
    hessians: dict[str, HessianState] = field(default_factory=dict)
    pools: dict[str, HessianState] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    offsets: dict[str, Tensor] | None = None
    changed: dict[str, Tensor] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    promised: Promise | None = None
    survey_needed: bool = False
    evidence: Evidence | None = None


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf8")
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that share their keys as CSV, atomically; nothing where there are no rows."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def digest(data: Any) -> str:
    """Short SHA-256 of a JSON-like value; keys in any order, everything else by its ``str``."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_path(folder: Path, block: int) -> Path:
    """File of one finished block in a run folder."""
    return folder / "blocks" / f"block_{block:03d}.safetensors"


def save_block(
    folder: Path, block: int, run: Run, names: list[str], changed: list[str], fingerprint: dict[str, str]
) -> None:
    """Write a finished block: its quantized weights, changed parameters, errors, fallbacks and usage."""
    tensors: dict[str, Tensor] = {f"changed:{name}": run.changed[name] for name in changed}
    for name in names:
        weight = run.quantized[name]
        tensors |= {f"{name}.codes": weight.codes_OI, f"{name}.scale": weight.scale_OG}
        if weight.zero_point_OG is not None:
            tensors[f"{name}.zero_point"] = weight.zero_point_OG
    chosen = set(names)
    # All of it: a survey, which a resumed run does not repeat, has counted the blocks to come as well.
    tensors |= {f"usage:{path}": counts for path, counts in run.usage.items()}
    metadata = {
        "fingerprint": fingerprint,
        "grids": {n: [run.quantized[n].bits, run.quantized[n].group_size] for n in names},
        "errors": [row for row in run.errors if row["weight"] in chosen],
        "fallbacks": [asdict(fallback) for fallback in run.fallbacks if fallback.weight in chosen],
    }
    path = block_path(folder, block)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"moeq": json.dumps(metadata)})
    os.replace(temporary, path)


def load_block(folder: Path, block: int, run: Run, fingerprint: dict[str, str]) -> list[str]:
    """Read a finished block into the run; returns the names of its weights.

    Raises:
        ValueError: The block was made with another configuration, model or data.
    """
    path = block_path(folder, block)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["moeq"])
        changed = [key for key, value in fingerprint.items() if metadata["fingerprint"].get(key) != value]
        if changed:
            raise ValueError(
                f"{folder} holds blocks of a run with another {' and '.join(changed)}; "
                "set --trainer.default_root_dir to a new folder, or --model.restart true to start over in this one"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    for name, (bits, group_size) in metadata["grids"].items():
        run.quantized[name] = QuantizedWeight(
            tensors[f"{name}.codes"], tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point"), bits, group_size
        )
    run.usage |= {key.removeprefix("usage:"): counts for key, counts in tensors.items() if key.startswith("usage:")}
    run.changed |= {key.removeprefix("changed:"): value for key, value in tensors.items() if key.startswith("changed:")}
    run.errors += metadata["errors"]
    run.fallbacks += [Fallback(**fallback) for fallback in metadata["fallbacks"]]
    return list(metadata["grids"])
