"""Packed exports of tiny random models on given grids, beside the dequantized models that they were made of."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import dense_weight, weight_names
from moeq.export.moeq_format import write_checkpoint
from moeq.models.adapter import find_blocks
from moeq.models.experts import expert_modules
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import ROUTERS, real_weight, round_float, round_weight
from tests.tiny import save_tiny, tiny_tokenizer

FloatKind = Literal["mxfp4", "nvfp4"]
Grid = tuple[int, int | None, bool] | FloatKind  # bits, group size, symmetric
GridOf = Callable[[str], Grid | None]


@dataclass(frozen=True)
class Tiny:
    """A packed export, the model with the same values, and the codes."""

    folder: Path
    model: PreTrainedModel
    quantized: dict[str, QuantizedWeight]


def is_expert(name: str) -> bool:
    return ".experts." in name


def grid_3_bits(name: str) -> Grid:
    return (3, 32, False)


def grid_mixed(name: str) -> Grid | None:
    """Experts on 4 bits with zero points or on 2, by block; what attention reads with is kept, the rest has 8 bits."""
    if is_expert(name):
        return (4, 32, False) if ".layers.0." in name else (2, 32, True)
    return None if name.endswith(("_a_proj", "_mqa", "q_proj", "k_proj", "v_proj")) else (8, None, True)


GRIDS: dict[str, GridOf] = {"3 bits": grid_3_bits, "mixed": grid_mixed}


def write_tiny_packed(
    family: str,
    folder: Path,
    grid_of: GridOf,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prepare: Callable[[Path], object] = lambda source: None,
    multiple: int = 1,
    **overrides: Any,
) -> Tiny:
    """Quantize and export a tiny model; ``prepare`` changes its source's folder first.

    Weights whose sides are no multiples of ``multiple`` are kept.
    """
    source = save_tiny(family, folder / "source", dtype=dtype, **overrides)
    prepare(source)
    model = open_model(source, dtype)
    experts, quantized, blocks = expert_modules(model), {}, f"{find_blocks(model)[0]}."
    with torch.no_grad():
        for name in weight_names(model):
            if not name.startswith(blocks) or name.rpartition(".")[2] in ROUTERS or (grid := grid_of(name)) is None:
                continue
            view = dense_weight(model, name, experts)
            if any(side % multiple for side in view.shape):
                continue
            quantized[name] = round_float(view, grid) if isinstance(grid, str) else round_weight(view, *grid)
            view.copy_(real_weight(quantized[name]))
    write_checkpoint(model, tiny_tokenizer(), quantized, folder / "packed", metadata={"seed": 1})
    return Tiny(folder / "packed", model, quantized)


def open_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = model_class(config).from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.clone()  # out of the memory-mapped file
    return model


def logits_of(model: nn.Module, num_tokens: int = 24) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, num_tokens + 1)[None]).logits[0].float()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def add_draft_layer(source: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """One layer for speculative decoding behind the last block, announced."""
    config = config_of(source)
    path = f"model.layers.{config['num_hidden_layers']}"
    draft = {f"{path}.eh_proj.weight": torch.randn(8, 16).to(dtype), f"{path}.enorm.weight": torch.ones(8)}
    save_file(tensors_of(source) | draft, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))


def flip_a_bit(folder: Path, key: str) -> None:
    """Damage one tensor of a written folder."""
    tensors = tensors_of(folder)
    octets = tensors[key].clone().contiguous()
    octets.view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors | {key: octets}, folder / "model.safetensors", metadata={"format": "pt"})
