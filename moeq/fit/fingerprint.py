"""Fingerprint of a fit: digests of everything that decides what a block becomes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeq.disk.digest import digest, tensor_digest
from moeq.distributed import gather_lists

# Settings that do not change what a block becomes, or count by what became of them: the model's identity has the commit
# of a revision, and the dtype that is computed in is told as it was chosen.
NEUTRAL_SETTINGS = frozenset(
    {
        "name", "revision", "compute_dtype", "placement", "reference", "reference_mode", "restart", "label",
        "hessian_gib", "hidden_gib", "preflight",
    }
)  # fmt: skip


def run_fingerprint(
    settings: Mapping[str, Any], steps: Sequence[object], model: str, compute_dtype: torch.dtype
) -> dict[str, str]:
    """Digests of the configuration and the model of a run, and the dtype that it computes in; data come later.

    Args:
        settings: Options of the run; those of ``NEUTRAL_SETTINGS`` are left out.
        steps: What acts on the model, in its order.  Lightning's own callbacks and an object whose class says
            ``affects_weights = False`` are left out; one with ``constructor_arguments`` is told by them, any other by
            its public attributes.
        model: Identity of the source's files (``moeq.disk.identity``); what steps change is in their arguments.
        compute_dtype: Of the parameters in memory.
    """
    given = {key: stable_form(value) for key, value in settings.items() if key not in NEUTRAL_SETTINGS}
    configuration = digest({"settings": given, "steps": describe_steps(steps)})
    return {
        "configuration": configuration,
        "model": model,
        "compute dtype": str(compute_dtype).removeprefix("torch."),
    }


def describe_steps(steps: Sequence[object]) -> list[Any]:
    """Those that act on the model, in their order: Lightning's own and any with ``affects_weights = False`` do not."""
    return [describe_step(step) for step in steps if _affects_weights(type(step))]


def _affects_weights(kind: type) -> bool:
    return not kind.__module__.startswith("lightning.") and getattr(kind, "affects_weights", True)


def describe_step(step: object) -> list[Any]:
    """Module path and constructor arguments of a step, as JSON-like data."""
    known = getattr(step, "constructor_arguments", None)
    arguments = _public(step) if known is None else known
    return [_path_of(type(step)), stable_form(arguments)]


def stable_form(value: Any) -> Any:
    """JSON-like data that is equal for equal values in any process: no address, no order of a set.

    Tensors are told by their content, functions and classes by their place, other objects by the place of their class
    and their public attributes.
    """
    return _stable_form(value, ())


def _stable_form(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in inside:
        return "(itself)"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {str(key): _stable_form(item, inside) for key, item in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple):
        return [_stable_form(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_stable_form(item, inside) for item in value), key=str)
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Enum):
        return [_path_of(type(value)), value.name]
    if hasattr(value, "__qualname__"):
        return _path_of(value)
    return [_path_of(type(value)), _stable_form(_public(value), inside)]


def _public(value: object) -> dict[str, Any]:
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(getattr(value, "__dict__", ()))
    return {name: getattr(value, name) for name in names if not name.startswith("_")}


def _path_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def data_digest(datamodule: Any) -> str:
    """Digest of the calibration data: of its ``calibration_ids()`` where it has them, else of what its loader gives."""
    ids = getattr(datamodule, "calibration_ids", None)
    return batches_digest(datamodule.train_dataloader()) if ids is None else tensor_digest(ids())


def batches_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Digest of what a loader gives, over all ranks: of the tensors of every row, in any order of rows and ranks.

    Raises:
        ValueError: A batch is no mapping with ``input_ids``.
    """
    rows: list[str] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(
                f"a calibration batch is a {type(batch).__name__} without a tensor input_ids; the datamodule must give "
                'batches {"input_ids": int64 [B, L]}, with "attention_mask" where there is padding'
            )
        tensors = {name: value for name, value in sorted(batch.items()) if isinstance(value, Tensor)}
        for row in range(len(batch["input_ids"])):
            rows.append(digest([[name, tensor_digest(value[row].cpu())] for name, value in tensors.items()]))
    return digest(sorted(gather_lists(rows)))
