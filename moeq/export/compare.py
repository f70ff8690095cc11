"""Tensors of an export that was read back, against codes and values of the evaluated model, bit for bit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_weight
from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import dequantize_codes
from moeq.export.finished import FinishedModel
from moeq.export.reopen import Reopened
from moeq.models.adapter import find_blocks
from moeq.models.experts import expert_modules
from moeq.models.storage import is_widened, storage_dtype
from moeq.quant.spec import QuantizedWeight

# (folder, export that was read back, evaluated model, block or None for what lies outside of the blocks) -> quantized
# weights and other tensors that are equal.  The block is finished; unequal ones are an ExportMismatchError.
Compare = Callable[[Path | str, Reopened, FinishedModel, int | None], tuple[int, int]]
_SHOWN = 8  # names in an error message


class ExportMismatchError(ValueError):
    """The files on disk do not hold what was evaluated."""


def compare_packed(
    directory: Path | str, reopened: Reopened, source: FinishedModel, block: int | None
) -> tuple[int, int]:
    """Compare a part of a packed export with codes and values; see ``Compare``."""
    quantized: Mapping[str, QuantizedWeight] = {} if block is None else source.blocks.quantized(block)
    with nullcontext() if block is None else reopened.resident(block):
        layers = {name: m for name, m in _modules(reopened.model, block) if isinstance(m, PackedLinear)}
        _compare_codes(directory, layers, source.model, quantized)
        others = {
            name: tensor
            for name, tensor in _state(reopened.model, block).items()
            if name.rpartition(".")[0] not in layers or name.endswith(".bias")
        }
        _compare_values(directory, reopened.model, source, block, others.items())
    return len(layers), len(others)


def compare_dense(
    directory: Path | str, reopened: Reopened, source: FinishedModel, block: int | None
) -> tuple[int, int]:
    """Compare a part of a dense export with the values of the model, tensor by tensor; see ``Compare``."""
    ours = _state(reopened.model, None).items() if block is None else reopened.values(block)
    names = _compare_values(directory, reopened.model, source, block, ours)
    raise_for(directory, "tensors", sorted(names ^ _state(source.model, block).keys()))
    return 0, len(names)


def raise_for(directory: Path | str, what: str, names: list[str]) -> None:
    """Raise ExportMismatchError where there are names of things that differ."""
    if names:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise ExportMismatchError(
            f"{len(names)} {what} differ between {directory} and the evaluated model: {shown}; export again"
        )


def _compare_codes(
    directory: Path | str,
    layers: Mapping[str, PackedLinear],
    model: PreTrainedModel,
    quantized: Mapping[str, QuantizedWeight],
) -> None:
    raise_for(directory, "quantized weights", sorted(layers.keys() ^ set(quantized)))
    experts = expert_modules(model)
    differing, stale = [], []
    for name, layer in layers.items():
        weight = quantized[name]
        differing += [f"{name} ({part})" for part in _differences(layer.quantized(), weight)]
        stale += [] if _stands_for(weight, dense_weight(model, name, experts), model) else [name]
    raise_for(directory, "quantized weights", differing)
    raise_for(directory, "dequantized weights of the model", stale)


def _compare_values(
    directory: Path | str,
    reloaded: PreTrainedModel,
    source: FinishedModel,
    block: int | None,
    tensors: Iterable[tuple[str, Tensor]],
) -> set[str]:
    """Compare tensors that are not quantized, one after another; returns their names."""
    model, theirs = source.model, _state(source.model, block)
    experts, names, differing = expert_modules(model), set(), []
    for name, ours in tensors:
        names.add(name)
        # An expert projection that is not quantized is a linear there and a slice of one parameter here.
        counterpart = theirs[name] if name in theirs else dense_weight(model, name.rpartition(".")[0], experts)
        if not _same(ours, counterpart) or _other_dtype(reloaded, model, name):
            differing.append(name)
    raise_for(directory, "tensors", differing)
    return names


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
    if (ours.bits, ours.group_size, ours.kind) != (theirs.bits, theirs.group_size, theirs.kind):
        yield "grid"
    held, expected = ours.tensors(), theirs.tensors()
    for part in sorted(held.keys() | expected.keys()):
        if not _same(held.get(part), expected.get(part)):
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


def _other_dtype(reloaded: PreTrainedModel, model: PreTrainedModel, name: str) -> bool:
    """Whether the export of a widened model holds a tensor in another dtype than the source; values are apart."""
    return is_widened(model) and storage_dtype(reloaded, name) != storage_dtype(model, name)
