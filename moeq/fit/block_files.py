"""Finished blocks of a run on disk, from which a killed run continues."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeq.fit.run import Run
from moeq.quant.spec import Fallback, QuantizedWeight


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
