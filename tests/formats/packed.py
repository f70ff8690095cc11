"""Packed exports of tiny random models on given grids, and the dequantized models that they were made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import dense_weight, weight_names
from moeq.export.moeq_format import write_checkpoint
from moeq.models.experts import expert_modules
from tests.export.rounding import ROUTERS, real_weight, round_weight
from tests.tiny import save_tiny, tiny_tokenizer

Grid = tuple[int, int | None, bool]  # bits, group size, symmetric
GridOf = Callable[[str], Grid | None]


def is_expert(name: str) -> bool:
    return ".experts." in name


def write_tiny_packed(
    family: str, folder: Path, grid_of: GridOf, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> Path:
    """The source, the packed export below ``folder``, whose path is returned; weights without a grid stay."""
    source = save_tiny(family, folder / "source", dtype=dtype, **overrides)
    model = open_model(source, dtype)
    experts, quantized = expert_modules(model), {}
    with torch.no_grad():
        for name in weight_names(model):
            if name.rpartition(".")[2] in ROUTERS or (grid := grid_of(name)) is None:
                continue
            view = dense_weight(model, name, experts)
            quantized[name] = round_weight(view, *grid)
            view.copy_(real_weight(quantized[name]))
    write_checkpoint(model, tiny_tokenizer(), quantized, folder / "packed", metadata={"seed": 1})
    return folder / "packed"


def open_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = model_class(config).from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    return model


def logits_of(model: nn.Module, num_tokens: int = 24) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, num_tokens + 1)[None]).logits[0].float()
