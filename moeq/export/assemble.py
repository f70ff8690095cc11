"""The packed model that belongs to a dense model and the grids of its weights, and the tensors of each of its blocks.

As a whole it exists without values only, as the *skeleton* from which names, dtypes and shapes follow.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moeq.checkpoint.model_class import model_class, runs_code
from moeq.checkpoint.names import (
    dense_conversions,
    dense_weight,
    expert_leaves,
    packed_conversions,
    split_expert_name,
    weight_names,
)
from moeq.checkpoint.packed import PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig, install_packed_modules
from moeq.disk.tensor_file import Declared
from moeq.export.finished import FinishedModel
from moeq.export.stored import as_stored, block_tensors, declared_tensors
from moeq.models.experts import expert_modules, expert_weight, num_experts, parameter_name, projections
from moeq.models.storage import storage_dtype
from moeq.quant.spec import QuantizedWeight


def packed_format(weight: QuantizedWeight) -> PackedFormat:
    """Grid of a quantized weight."""
    return PackedFormat(weight.bits, weight.group_size, weight.zero_point_OG is None, weight.kind)


def packed_counterpart(
    model: PreTrainedModel, grids: Mapping[str, PackedFormat], metadata: dict[str, Any]
) -> PreTrainedModel:
    """Skeleton of the packed model of a dense one, whose blocks may be anywhere.

    Args:
        model: Dense model.
        grids: Of the quantized weights, by canonical name.
        metadata: Kept in the quantization config.

    Raises:
        ValueError: Nothing is quantized, a name is unknown, or the weights differ in dtype.
    """
    leaves = expert_leaves(model)
    config = MoEQConfig.from_grids(
        dict(grids),
        weight_names(model),
        weight_dtype=_shared_dtype(model, grids),
        expert_leaves=leaves,
        metadata=metadata,
    )
    skeleton = packed_skeleton(model.config, config, storage_dtype(model), trust_remote_code=runs_code(model))
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    skeleton._weight_conversions = packed_conversions(dense_conversions(model), leaves)
    return skeleton


def packed_skeleton(
    model_config: PretrainedConfig, config: MoEQConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Packed model on the meta device: modules and names, no values."""
    model_config = copy.deepcopy(model_config)
    model_config.quantization_config = config
    with torch.device("meta"):
        opened_by = model_class(model_config)
        skeleton: PreTrainedModel = opened_by.from_config(
            model_config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    install_packed_modules(skeleton, config)
    return skeleton


def packed_declared(model: PreTrainedModel, skeleton: PreTrainedModel) -> dict[str, Declared]:
    """Dtype and shape of everything that a packed export holds, by name in the packed model."""
    kept, known = declared_tensors(model), model.state_dict().keys()
    experts, declared = expert_modules(model), {}
    packed = {name for name, module in skeleton.named_modules() if isinstance(module, PackedLinear)}
    for name, tensor in skeleton.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if name in kept:
            declared[name] = kept[name]
        elif owner in packed and leaf != "bias":
            declared[name] = Declared(tensor.dtype, tuple(tensor.shape))
        elif name not in known:  # a projection of one expert, which is a slice of one parameter in the dense model
            dtype = storage_dtype(model, _parameter_of(owner, experts))
            declared[name] = Declared(dtype, tuple(tensor.shape))
    return declared


def packed_block(
    source: FinishedModel, skeleton: PreTrainedModel, grids: Mapping[str, PackedFormat], block: int
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a block, which is finished, by name in the packed model, one after another.

    Args:
        source: The dense model and its codes.
        skeleton: Of the packed model.
        grids: Of the quantized weights, by canonical name.
        block: Index of the block.

    Raises:
        ValueError: The codes of the block are not those of ``grids``, or do not fit the model; other tensors hold
            values that the source's files do not.
    """
    model, path = source.model, f"{source.path(block)}."
    quantized = source.blocks.quantized(block)
    names = set(quantized)  # asking the mapping itself may read and unpack codes
    experts = {name: module for name, module in expert_modules(model).items() if name.startswith(path)}
    if differing := sorted(names ^ {name for name in grids if name.startswith(path)}):
        raise ValueError(
            f"{path[:-1]} has codes of {len(names)} weights, which are not those of the plan, first {differing[0]}; "
            "quantize every planned weight"
        )
    apart = {name: m for name, m in experts.items() if isinstance(skeleton.get_submodule(name), PackedExperts)}
    replaced = {f"{name}.weight" for name in names}
    replaced |= {f"{name}.{parameter_name(m, part)}" for name, m in apart.items() for part in ("into", "down")}
    for name, tensor in block_tensors(source, block):
        if name not in replaced:
            yield name, as_stored(model, name, tensor)
    for name, module in apart.items():
        for projection, weight_OI in _projections(name, module):
            if projection not in names:
                yield f"{projection}.weight", as_stored(model, _parameter_of(projection, experts), weight_OI)
    for name, weight in quantized.items():
        check_weight(model, name, weight, grids[name], experts)
        for part, tensor in packed_tensors(weight).items():
            yield f"{name}.{part}", tensor


def check_weight(
    model: PreTrainedModel, name: str, weight: QuantizedWeight, grid: PackedFormat, experts: dict[str, nn.Module]
) -> None:
    """Raise ValueError where codes are not on their grid, or are not those of the weight of this name."""
    dense, dtype = dense_weight(model, name, experts), _stored_dtype(model, name, experts)
    if dense.shape != weight.codes_OI.shape:
        raise ValueError(
            f"codes of {name} have shape {tuple(weight.codes_OI.shape)}, the weight has {tuple(dense.shape)}; "
            "pass the model that was quantized"
        )
    if dtype != weight.dtype:
        raise ValueError(
            f"scales of {name} are {weight.dtype}, the weight is {dtype}; "
            "round scales to the model's dtype before quantizing"
        )
    if packed_format(weight) != grid:
        raise ValueError(f"{name} is on {packed_format(weight)}, planned was {grid}; quantize it as planned")
    if (highest := int(weight.codes_OI.max())) >= 2**weight.bits:
        raise ValueError(f"{name} has code {highest}, but {weight.bits} bits hold at most {2**weight.bits - 1}")


def _shared_dtype(model: PreTrainedModel, grids: Mapping[str, PackedFormat]) -> torch.dtype:
    """Dtype that the files have for all quantized weights, and for their scales."""
    if not grids:
        raise ValueError("no weight is quantized; quantize at least one, or write a dense export")
    experts = expert_modules(model)
    dtypes = {_stored_dtype(model, name, experts) for name in grids}
    if len(dtypes) > 1:
        raise ValueError(
            f"weights have dtypes {sorted(map(str, dtypes))}; quantize a model whose weights share a dtype"
        )
    return dtypes.pop()


def _stored_dtype(model: PreTrainedModel, name: str, experts: dict[str, nn.Module]) -> torch.dtype:
    """Dtype of the source's files for a weight of a canonical name."""
    dense_weight(model, name, experts)  # raises for an unknown name
    return storage_dtype(model, _parameter_of(name, experts))


def _parameter_of(name: str, experts: dict[str, nn.Module]) -> str:
    """Name of the parameter of the dense model that holds a weight of a canonical name."""
    parts = split_expert_name(name, experts)
    if parts is None:
        return f"{name}.weight"
    path, _, leaf = parts
    return f"{path}.{parameter_name(experts[path], 'down' if leaf == 'down_proj' else 'into')}"


def _projections(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every projection of every expert of a module: canonical name and weight [O, I] (a view)."""
    for expert in range(num_experts(module)):
        for leaf in projections(module):
            yield f"{path}.{expert}.{leaf}", expert_weight(module, expert, leaf).detach()
