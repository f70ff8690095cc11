"""Packed modules and models of random codes, for timing: nothing is quantized, every weight is drawn."""

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.speed.drawn import DEVIATION, drawn_weight
from moeq.checkpoint.forms import Form, Maker
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import dense_weight, weight_names
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExpert, PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.checkpoint.prepare import choose_forms
from moeq.checkpoint.quantizer import MoEQConfig, install_packed_modules
from moeq.export.moeq_format import write_checkpoint
from moeq.formats.convert import convert
from moeq.models.experts import expert_modules, expert_weight, projections
from tests.tiny import tiny_tokenizer

# The experts of Qwen3-30B-A3B, and the whole of a small model of its kind (0.86 B parameters with 16 thousand tokens).
LARGE_BLOCK: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384,
    "norm_topk_prob": True, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@cache
def drawn_tensors(rows: int, columns: int, grid: PackedFormat) -> dict[str, Tensor]:
    """Tensors of one drawn weight of a shape and grid."""
    return packed_tensors(drawn_weight(rows, columns, grid))


def fill(layer: PackedLinear) -> None:
    """Give a packed linear (on the meta device) a copy of the drawn weight of its shape."""
    for name, tensor in drawn_tensors(layer.out_features, layer.in_features, layer.grid).items():
        setattr(layer, name, nn.Parameter(tensor.clone(), requires_grad=False))


@torch.no_grad()
def dense_experts(config: Qwen3MoeConfig) -> Qwen3MoeExperts:
    """The experts of a block in bfloat16."""
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, DEVIATION)))
    return experts.requires_grad_(False)


def prepared_experts(dense: nn.Module, grid: PackedFormat, maker: Maker) -> PackedExperts:
    """Packed experts of the shape of ``dense`` in a form, each with a copy of one drawn weight."""
    made: dict[tuple[int, int], Form] = {}
    experts = []
    for expert in range(int(dense.num_experts)):  # type: ignore[arg-type]
        layers: dict[str, nn.Module] = {}
        for leaf in projections(dense):
            rows, columns = expert_weight(dense, expert, leaf).shape
            if (rows, columns) not in made:
                made[rows, columns] = maker(drawn_weight(rows, columns, grid))
            with torch.device("meta"):
                layer = PackedLinear(columns, rows, grid, torch.bfloat16)
            layer.hold(copy.deepcopy(made[rows, columns]), maker)
            layers[leaf] = layer
        experts.append(PackedExpert(**layers))
    packed = PackedExperts(dense, experts)
    config: Any = copy.copy(dense.config)
    config._experts_implementation = IMPLEMENTATION
    packed.config = config
    return packed


@torch.no_grad()
def packed_model(config: Any, grids: Mapping[str, PackedFormat]) -> PreTrainedModel:
    """A packed model of drawn weights in bfloat16.

    Args:
        config: Of the model.
        grids: Of weights by canonical name; others stay in bfloat16.
    """
    model = _packed_on_meta(config, grids)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            fill(module)
    return _filled(model)


@torch.no_grad()
def prepared_model(config: Any, grids: Mapping[str, PackedFormat]) -> PreTrainedModel:
    """A prepared packed model in bfloat16: each weight is a copy of the form of one drawn weight of its shape and grid.

    Args:
        config: Of the model.
        grids: Of weights by canonical name; others stay in bfloat16.

    Raises:
        ValueError: A weight has no form here.
    """
    model, made = _packed_on_meta(config, grids), dict[Any, Form]()
    # A choice of forms asks where weights are, which are nowhere yet.
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight_shape = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    for name, maker in choose_forms(model).items():
        if isinstance(maker, str):
            raise ValueError(f"{name} has no form here: {maker}")
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        key = layer.out_features, layer.in_features, layer.grid
        if (*key, maker) not in made:
            made[(*key, maker)] = maker(drawn_weight(*key))
        layer.hold(copy.deepcopy(made[(*key, maker)]), maker)
    for module in model.modules():
        if isinstance(module, PackedExpert):
            module.join()
    _filled(model).set_experts_implementation(IMPLEMENTATION)
    return model


def _packed_on_meta(config: Any, grids: Mapping[str, PackedFormat]) -> PreTrainedModel:
    model = _on_meta(config)
    quantization = MoEQConfig.from_grids(
        dict(grids), weight_names(model), weight_dtype=torch.bfloat16, expert_leaves={}, metadata={}
    )
    install_packed_modules(model, quantization)
    return model


def gguf_of(packed: PreTrainedModel, folder: Path) -> Path:
    """The file for llama.cpp of a packed model, with a tokenizer of few tokens."""
    convert(export_of(packed, folder), "gguf", folder / "gguf")
    return folder / "gguf/model.gguf"


@torch.no_grad()
def export_of(packed: PreTrainedModel, folder: Path) -> Path:
    """The packed folder of a packed model, with a tokenizer of few tokens."""
    dense, quantized = _on_meta(packed.config), {}
    parts = dict(packed.named_parameters())
    _filled(dense)
    experts = expert_modules(dense)
    for name in weight_names(dense):
        layer = packed.get_submodule(name)
        if isinstance(layer, PackedLinear):
            quantized[name] = layer.quantized()
            dense_weight(dense, name, experts).copy_(layer.weight)
    for name, parameter in dense.named_parameters():
        if name in parts:
            parameter.copy_(parts[name])
    write_checkpoint(dense, tiny_tokenizer(), quantized, folder / "export", metadata={})
    return folder / "export"


@torch.no_grad()
def dense_model(config: Any) -> PreTrainedModel:
    """A model of drawn weights in bfloat16."""
    return _filled(_on_meta(config))


def _on_meta(config: Any) -> PreTrainedModel:
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config).from_config(config, dtype=torch.bfloat16)
    return model


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                # Biases of one would make all tokens alike, and choose the same experts for them.
                constant = 0.0 if name.endswith("bias") else 1.0
                value = value.fill_(constant) if parameter.ndim == 1 else value.normal_(0, DEVIATION)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            made = type(module)(config=model.config)  # rotary frequencies are computed by the module itself
            module._buffers.update(made._buffers)
            assert path
    model.tie_weights()
    return model.eval()
