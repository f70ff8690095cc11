"""Tensors of an export that was read back, against codes and values of the evaluated model, bit for bit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_weight
from moeq.checkpoint.packed import PackedLinear, dequantize_codes
from moeq.export.finished import FinishedModel
from moeq.models.adapter import find_blocks
from moeq.models.experts import expert_modules
from moeq.models.storage import is_widened, storage_dtype
from moeq.quant.spec import QuantizedWeight

# (folder, reloaded model, evaluated model, block or None for what lies outside of the blocks) -> quantized weights and
# other tensors that are equal.  The block is there in both models; unequal ones are an ExportMismatchError.
Compare = Callable[[Path | str, PreTrainedModel, FinishedModel, int | None], tuple[int, int]]
_SHOWN = 8  # names in an error message


class ExportMismatchError(ValueError):
    """The files on disk do not hold what was evaluated."""


def compare_packed(
    directory: Path | str, reloaded: PreTrainedModel, source: FinishedModel, block: int | None
) -> tuple[int, int]:
    """Compare a part of a packed export with codes and values; see ``Compare``."""
    model, experts = source.model, expert_modules(source.model)
    quantized: Mapping[str, QuantizedWeight] = {} if block is None else source.blocks.quantized(block)
    layers = {name: module for name, module in _modules(reloaded, block) if isinstance(module, PackedLinear)}
    raise_for(directory, "quantized weights", sorted(layers.keys() ^ quantized.keys()))
    differing, stale = [], []
    for name, layer in layers.items():
        weight = quantized[name]
        differing += [f"{name} ({part})" for part in _differences(layer.quantized(), weight)]
        stale += [] if _stands_for(weight, dense_weight(model, name, experts), model) else [name]
    raise_for(directory, "quantized weights", differing)
    raise_for(directory, "dequantized weights of the model", stale)
    dense, others = _state(model, block), {}
    for name, tensor in _state(reloaded, block).items():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers or leaf == "bias":
            # An expert projection that is not quantized is a linear here and a slice of one parameter there.
            others[name] = tensor, dense[name] if name in dense else dense_weight(model, owner, experts)
    _raise_for_tensors(directory, reloaded, model, others)
    return len(layers), len(others)


def compare_dense(
    directory: Path | str, reloaded: PreTrainedModel, source: FinishedModel, block: int | None
) -> tuple[int, int]:
    """Compare a part of a dense export with the values of the model; see ``Compare``."""
    ours, theirs = _state(reloaded, block), _state(source.model, block)
    raise_for(directory, "tensors", sorted(ours.keys() ^ theirs.keys()))
    _raise_for_tensors(directory, reloaded, source.model, {name: (ours[name], theirs[name]) for name in ours})
    return 0, len(ours)


def raise_for(directory: Path | str, what: str, names: list[str]) -> None:
    """Raise ExportMismatchError where there are names of things that differ."""
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ExportMismatchError(
            f"{len(names)} {what} differ between {directory} and the evaluated model: {shown}; export again"
        )


def _raise_for_tensors(
    directory: Path | str,
    reloaded: PreTrainedModel,
    model: PreTrainedModel,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    differing = [name for name, (ours, theirs) in pairs.items() if not _same(ours, theirs)]
    raise_for(directory, "tensors", differing + _other_dtypes(reloaded, model, pairs))


def _modules(model: nn.Module, block: int | None) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a block, or outside of the blocks, by path."""
    prefix, blocks = find_blocks(model)
    if block is not None:
        yield from blocks[block].named_modules(prefix=f"{prefix}.{block}")
        return
    yield from ((name, module) for name, module in model.named_modules() if not name.startswith(f"{prefix}."))


def _state(model: nn.Module, block: int | None) -> dict[str, Tensor]:
    """Tensors of a block, or outside of the blocks, by name."""
    prefix, blocks = find_blocks(model)
    if block is not None:
        return dict(blocks[block].state_dict(prefix=f"{prefix}.{block}."))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{prefix}.")}


def _differences(ours: QuantizedWeight, theirs: QuantizedWeight) -> Iterator[str]:
    if (ours.bits, ours.group_size) != (theirs.bits, theirs.group_size):
        yield "grid"
    for part in ("codes_OI", "scale_OG", "zero_point_OG"):
        if not _same(getattr(ours, part), getattr(theirs, part)):
            yield part


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


def _stands_for(quantized: QuantizedWeight, weight_OI: Tensor, model: PreTrainedModel) -> bool:
    """Whether codes give exactly a weight of the model, and in the dtype that its file has for it."""
    real_OI = dequantize_codes(quantized)
    stored = storage_dtype(model) if is_widened(model) else weight_OI.dtype
    return real_OI.dtype == stored and _same(real_OI.to(weight_OI.dtype), weight_OI)


def _other_dtypes(reloaded: PreTrainedModel, model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Tensors of a widened model that the export holds in another dtype than the source; values are compared apart."""
    if not is_widened(model):
        return []
    return [name for name in names if storage_dtype(reloaded, name) != storage_dtype(model, name)]
