"""The packed model that belongs to a dense model and the codes of some of its weights.

It shares every tensor that is not quantized with the dense model, and is not made to run (buffers that files do not
hold stay on the meta device): it is what ``save_pretrained`` writes.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moeq.checkpoint.names import (
    check_expressible,
    dense_conversions,
    dense_weight,
    expert_leaves,
    packed_conversions,
    weight_names,
)
from moeq.checkpoint.packed import PackedExperts, PackedFormat, packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig, install_packed_modules
from moeq.models.experts import expert_modules, expert_weight, num_experts, parameter_name, projections
from moeq.quant.spec import QuantizedWeight


def pack_model(
    model: PreTrainedModel, quantized: dict[str, QuantizedWeight], metadata: dict[str, Any]
) -> PreTrainedModel:
    """Assemble the packed model.

    Args:
        model: Dense model.
        quantized: Codes by canonical weight name.
        metadata: Kept in the quantization config.

    Raises:
        ValueError: See ``check_quantized``.
    """
    dtype = check_quantized(model, quantized)
    leaves = expert_leaves(model)
    config = MoEQConfig.from_grids(
        {name: _grid(weight) for name, weight in quantized.items()},
        weight_names(model),
        weight_dtype=dtype,
        expert_leaves=leaves,
        metadata=metadata,
    )
    packed = packed_skeleton(model.config, config, model.dtype)
    packed.load_state_dict(_tensors(model, packed, quantized), strict=True, assign=True)
    packed.generation_config = copy.deepcopy(model.generation_config)
    packed._weight_conversions = packed_conversions(dense_conversions(model), leaves)
    return packed


def packed_skeleton(model_config: PretrainedConfig, config: MoEQConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Packed model on the meta device: modules and names, no values."""
    model_config = copy.deepcopy(model_config)
    model_config.quantization_config = config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    install_packed_modules(skeleton, config)
    return skeleton


def check_quantized(model: PreTrainedModel, quantized: dict[str, QuantizedWeight]) -> torch.dtype:
    """Check that every quantized weight is one of the model's; returns the dtype that their scales share.

    Raises:
        ValueError: The family's experts cannot be expressed, nothing is quantized, a name is unknown, a shape or a code
            is out of range, or scales and weights differ in dtype.
    """
    check_expressible(model)
    if not quantized:
        raise ValueError("no weight is quantized; quantize at least one, or write a dense export")
    experts = expert_modules(model)
    dtypes = set()
    for name, weight in quantized.items():
        dense = dense_weight(model, name, experts)
        dtypes.add(weight.scale_OG.dtype)
        if dense.shape != weight.codes_OI.shape:
            raise ValueError(
                f"codes of {name} have shape {tuple(weight.codes_OI.shape)}, the weight has {tuple(dense.shape)}; "
                "pass the model that was quantized"
            )
        if dense.dtype != weight.scale_OG.dtype:
            raise ValueError(
                f"scales of {name} are {weight.scale_OG.dtype}, the weight is {dense.dtype}; "
                "round scales to the model's dtype before quantizing"
            )
        if (highest := int(weight.codes_OI.max())) >= 2**weight.bits:
            raise ValueError(f"{name} has code {highest}, but {weight.bits} bits hold at most {2**weight.bits - 1}")
    if len(dtypes) > 1:
        raise ValueError(f"scales have dtypes {sorted(map(str, dtypes))}; quantize a model whose weights share a dtype")
    return dtypes.pop()


def _grid(weight: QuantizedWeight) -> PackedFormat:
    return PackedFormat(weight.bits, weight.group_size, symmetric=weight.zero_point_OG is None)


def _tensors(
    model: PreTrainedModel, packed: PreTrainedModel, quantized: dict[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Values of every parameter of the packed model."""
    replaced = {f"{name}.weight" for name in quantized}
    experts = expert_modules(model)
    apart = {path: module for path, module in experts.items() if _holds_experts_apart(packed, path)}
    replaced |= {f"{path}.{parameter_name(m, part)}" for path, m in apart.items() for part in ("into", "down")}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in replaced}
    for path, module in apart.items():
        for name in (f"{path}.{e}.{leaf}" for e in range(num_experts(module)) for leaf in projections(module)):
            if name not in quantized:
                # A copy: safetensors does not write several views of one tensor.
                expert, leaf = name.rsplit(".", 2)[1:]
                tensors[f"{name}.weight"] = expert_weight(module, int(expert), leaf).detach().clone()
    for name, weight in quantized.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed_tensors(weight).items()}
    return tensors


def _holds_experts_apart(packed: PreTrainedModel, path: str) -> bool:
    return isinstance(packed.get_submodule(path), PackedExperts)
