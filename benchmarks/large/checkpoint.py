"""Checkpoints with the shapes of a large model and random weights, written block by block.

Weights are normal with deviation 0.02, norms lie around one.  Drawing billions of normal numbers takes minutes on a
core, so 67 million are drawn once, and a tensor is made of pieces of them from random places: each has the
distribution, but numbers of one tensor stand in others, too.  That matters to nothing that is measured here (sizes,
times, bytes); no statement about quality can be made on such a model.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moeq.disk.atomic import copy_file, write_json, write_tensors
from moeq.disk.folder import INDEX

DEVIATION = 0.02
POOL = 1 << 26
OUTSIDE = "outside.safetensors"
SHAPE = "shape.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the family qwen3_moe, by the names of its configuration."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int

    def block_shapes(self, block: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a block, by the key of published checkpoints."""
        width, experts, inner = self.hidden_size, self.num_experts, self.moe_intermediate_size
        query, key = (heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads))
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
            "self_attn.q_proj.weight": (query, width),
            "self_attn.k_proj.weight": (key, width),
            "self_attn.v_proj.weight": (key, width),
            "self_attn.o_proj.weight": (width, query),
            "mlp.gate.weight": (experts, width),
        }
        for expert in range(experts):
            path = f"mlp.experts.{expert}"
            shapes |= {f"{path}.gate_proj.weight": (inner, width), f"{path}.up_proj.weight": (inner, width)}
            shapes[f"{path}.down_proj.weight"] = (width, inner)
        return {f"model.layers.{block}.{name}": shape for name, shape in shapes.items()}

    def outside_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that belongs to no block."""
        table = (self.vocab_size, self.hidden_size)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden_size,), "lm_head.weight": table}

    def block_numbers(self) -> int:
        """Parameters of a block."""
        return sum(torch.Size(shape).numel() for shape in self.block_shapes(0).values())


QWEN3_30B_A3B = Shape(2048, 32, 4, 128, 128, 8, 768, 151936)
QUICK = Shape(256, 4, 2, 64, 16, 4, 128, 4096)


def config_of(shape: Shape, num_blocks: int, end_id: int) -> dict[str, Any]:
    """``config.json`` as Qwen3-30B-A3B has it, with the ids of another tokenizer."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        **asdict(shape), "num_hidden_layers": num_blocks, "intermediate_size": 3 * shape.hidden_size,
        "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 40960, "max_window_layers": num_blocks,
        "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_cache": True, "use_sliding_window": False,
        "bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id,
    }  # fmt: skip


class Draws:
    """Normal numbers from a pool.

    Args:
        seed: Of the pool.
        size: Numbers of the pool.
    """

    def __init__(self, seed: int, size: int = POOL) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(size, generator=generator).mul_(DEVIATION).bfloat16()

    def tensors(self, shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        """bfloat16 tensors of given shapes; those of one dimension are norms, around one.

        Args:
            shapes: By name.
            seed: Of the places in the pool.
        """
        generator = torch.Generator().manual_seed(seed)
        made = {name: self._drawn(torch.Size(shape).numel(), generator).view(shape) for name, shape in shapes.items()}
        return {name: 1 + value if value.ndim == 1 else value for name, value in made.items()}

    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        piece = max(1, len(self._pool) // 4)
        parts = []
        for start in range(0, count, piece):
            length = min(piece, count - start)
            place = int(torch.randint(len(self._pool) - length + 1, (1,), generator=generator))
            parts.append(self._pool[place : place + length])
        return torch.cat(parts)


def shards(shape: Shape, num_blocks: int) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Name and tensors of every file: what lies outside of the blocks, then one file per block, all below 4 GB."""
    yield OUTSIDE, shape.outside_shapes()
    for block in range(num_blocks):
        yield f"block_{block:03d}.safetensors", shape.block_shapes(block)


def write_checkpoint(folder: Path, shape: Shape, num_blocks: int, seed: int, tokenizer: str) -> None:
    """Write a checkpoint, of which at most one file is in memory; files that are there already are kept.

    The numbers of a block depend on the seed and on its index alone, so that a smaller model is a part of a larger one.

    Args:
        folder: Where.
        shape: Sizes of the model.
        num_blocks: Its blocks.
        seed: Of the numbers.
        tokenizer: Folder of a tokenizer with no more tokens than the model.

    Raises:
        ValueError: The folder holds a checkpoint of another shape or seed.
    """
    made = {**asdict(shape), "seed": seed}
    if (folder / SHAPE).is_file() and (found := json.loads((folder / SHAPE).read_text())) != made:
        raise ValueError(f"{folder} holds a checkpoint made with {found}, not {made}; give another folder")
    write_json(folder / SHAPE, made)
    draws = None
    for number, (name, shapes) in enumerate(shards(shape, num_blocks)):
        if not (folder / name).is_file():
            draws = draws or Draws(seed)
            write_tensors(folder / name, draws.tensors(shapes, (seed << 16) + number), {"format": "pt"})
    _write_rest(folder, shape, num_blocks, tokenizer)


def link_checkpoint(source: Path, folder: Path, shape: Shape, num_blocks: int, tokenizer: str) -> None:
    """The first blocks of a checkpoint as a folder of their own, whose weights are links to the files of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, _ in shards(shape, num_blocks):
        if not (folder / name).exists():
            os.link(source / name, folder / name)
    _write_rest(folder, shape, num_blocks, tokenizer)


def _write_rest(folder: Path, shape: Shape, num_blocks: int, tokenizer: str) -> None:
    """Tokenizer, index and configuration; the last makes a folder a checkpoint."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    if len(loaded) > shape.vocab_size:
        raise ValueError(f"{tokenizer} has {len(loaded)} tokens and the model {shape.vocab_size}; give a smaller one")
    for path in Path(tokenizer).glob("tokenizer*.json"):
        copy_file(path, folder / path.name)
    weight_map = {key: name for name, shapes in shards(shape, num_blocks) for key in shapes}
    total = sum((folder / name).stat().st_size for name, _ in shards(shape, num_blocks))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config_of(shape, num_blocks, loaded.eos_token_id))
