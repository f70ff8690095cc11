"""What is exported: models, the grids of their weights, and what single families need so that runtimes know them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_weight, weight_names
from moeq.models.adapter import find_blocks
from moeq.models.experts import expert_modules
from moeq.quant.carrier import CarrierMode, FormatName
from moeq.quant.spec import GridSpec

REFERENCE = "reference"
UNQUANTIZED = "unquantized"
# Grid of a weight by canonical name and number of its block; None keeps it.
GridOf = Callable[[str, int], GridSpec | None]
# Last parts of names.  llama.cpp has the columns of ``linear_attn.out_proj`` in another order, which takes groups of 32
# apart in models as small as these.
_KEPT = ("lm_head", "gate", "wg", "router", "shared_expert_gate", "weights_proj", "linear_attn.out_proj")
_OUTPUTS = ("o_proj", "out_proj", "dense")  # of attention: no runtime merges them with another linear
_MULTIPLE = 32


@dataclass(frozen=True)
class Cell:
    """One export in one format.

    Attributes:
        model: "reference", or a family's tiny random model.
        grids: Key of ``REFERENCE_GRIDS`` or ``TINY_GRIDS``.
        format: Its name.
        carrier: Which types of the format may hold a grid.
    """

    model: str
    grids: str
    format: FormatName
    carrier: CarrierMode = "exact"


def _grid(bits: int, group_size: int | None, *, symmetric: bool = True) -> GridSpec:
    """Ranges from minimum and maximum: what is judged here is how values are read, not which they are."""
    return GridSpec(bits, group_size, symmetric, clip_search=False)


def _signed(bits: int, group_size: int | None) -> GridSpec:
    """Full-range: half of the scales are negative, of the groups whose largest weight is positive."""
    return GridSpec(bits, group_size, symmetric=True, clip_search=False, kind="full_range")


def _uniform(bits: int, group_size: int | None, *, symmetric: bool = True) -> GridOf:
    return _everywhere(_grid(bits, group_size, symmetric=symmetric))


def _everywhere(grid: GridSpec) -> GridOf:
    return lambda name, block: grid


def _by_block(low: GridSpec, high: GridSpec) -> GridOf:
    """Experts of even blocks on one grid and of odd blocks on another, the rest on 8 bits."""
    rest = replace(high, bits=8)
    return lambda name, block: (low, high)[block % 2] if ".experts." in name else rest


def _by_projection(low: GridSpec, high: GridSpec) -> GridOf:
    """Down projections of experts on the finer of two grids."""
    return lambda name, block: high if ".experts." not in name or name.endswith("down_proj") else low


def _by_expert(low: GridSpec, high: GridSpec) -> GridOf:
    """Every third expert on the finer of two grids."""

    def grid(name: str, block: int) -> GridSpec:
        return low if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) % 3 else high

    return grid


_LOW, _HIGH = _grid(2, 64), _grid(4, 64)
REFERENCE_GRIDS: dict[str, GridOf] = {
    "2": _uniform(2, 64),
    "3": _uniform(3, 64),
    "4": _uniform(4, 64),
    "8": _uniform(8, 64),
    "3, zero points": _uniform(3, 64, symmetric=False),
    "4, zero points": _uniform(4, 64, symmetric=False),
    "4, channels": _uniform(4, None),
    "2 and 4 by block": _by_block(_LOW, _HIGH),
    "2 and 4 by projection": _by_projection(_LOW, _HIGH),
    "2 and 4 by expert": _by_expert(_LOW, _HIGH),
    **{f"{bits}, full range": _everywhere(_signed(bits, 64)) for bits in (2, 3, 4, 8)},
    **{f"4, full range, groups of {size}": _everywhere(_signed(4, size)) for size in (32, 128)},
    "2 and 4 by projection, full range": _by_projection(_signed(2, 64), _signed(4, 64)),
    "4 and 8 by block, full range": _by_block(_signed(4, 64), _signed(8, 64)),
    **{kind: _everywhere(GridSpec.of_kind(kind, clip_search=False)) for kind in ("iq4_nl", "mxfp4", "nvfp4")},
}
TINY_GRIDS: dict[str, GridOf] = {
    "2": _uniform(2, None),
    "4": _uniform(4, 32),
    "8": _uniform(8, 32),
    "2 and 4 by block": _by_block(_grid(2, 32), _grid(4, 32)),
}


def _rope_of_kinds(full: float, sliding: float, factor: float) -> dict[str, Any]:
    """Rotary parameters of blocks of both kinds."""
    shared = {"rope_type": "default", "partial_rotary_factor": factor}
    return {
        "full_attention": {**shared, "rope_theta": full},
        "sliding_attention": {**shared, "rope_theta": sliding},
    }


# Options of tiny models, other than those of ``tests.families``, with which runtimes compute.
_WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
_MISTRAL = {
    **_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512,
}  # fmt: skip
# Two heads give many tokens a score of 0 alike, of which each runtime takes others.
_MANY_INDEX_HEADS = {"index_n_heads": 32, "index_head_dim": 64, "index_topk": 8}
# One block of each kind, an indexer that leaves tokens out, n-grams in small tables.
_QWEN4_EXP = {
    "layer_types": ["linear_attention", "full_attention"], "output_gate_type": "sigmoid", "indexer_n_heads": 32,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "ple_layer_ids": [1], "heads_per_ngram": 4, "ngram_vocab_size_base": 50, "split_ngram_parts": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
_DOTS3 = {
    **_MANY_INDEX_HEADS, "sliding_window": 8, "n_group": 1, "layer_types": ["indexed_attention", "sliding_attention"],
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
    "swa_head_dim": 64, "swa_qk_nope_head_dim": 32, "swa_v_head_dim": 32, "qk_rope_head_dim": 32,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral4": {"rope_parameters": _MISTRAL},
    "mistral3": {"rope_parameters": _MISTRAL},
    "deepseek_ocr2": {"num_key_value_heads": 4},
    "deepseek_v32": _MANY_INDEX_HEADS,
    "glm_moe_dsa": _MANY_INDEX_HEADS,
    "qwen4_exp_text": _QWEN4_EXP,
    "qwen4_exp": _QWEN4_EXP,
    "glm5_next": {**_MANY_INDEX_HEADS, "qk_rope_head_dim": 0},
    "dots3_note_text": _DOTS3,
    "dots3_note": _DOTS3,
    "minimax": {"rms_norm_eps": 1e-6},
    # A block of each kind: llama.cpp ends without one that has an indexer.
    "deepseek_v4": {
        "index_n_heads": 32,
        "index_head_dim": 64,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
    "hy_v4": _MANY_INDEX_HEADS | {"rms_norm_eps": 1e-6},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "internvl": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "dots1": {"num_key_value_heads": 4, "sliding_window": None},
    "kimi_linear": {"q_lora_rank": None, "rms_norm_eps": 1e-6},
    "mimo_v2_flash": {"rope_parameters": _rope_of_kinds(5e6, 1e4, 0.5)},
    "mellum": {"rope_parameters": _rope_of_kinds(1e4, 1e4, 1.0)},
    "deepseek_v2": {"rope_parameters": _YARN},
    "afmoe": {"num_hidden_layers": 4, "layer_types": _WINDOWS, "mup_enabled": True, "route_scale": 2.0},
}


def grids_of(model: PreTrainedModel, key: str, grids: dict[str, GridOf]) -> dict[str, GridSpec]:
    """Grids of the weights that are quantized, by canonical name.

    Args:
        model: Dense.
        key: Of ``grids``, or "unquantized": one linear at 8 bits, since an export has to have one; it is the output of
            an attention.
        grids: ``REFERENCE_GRIDS`` or ``TINY_GRIDS``.
    """
    experts, blocks = expert_modules(model), f"{find_blocks(model)[0]}."
    names = [
        name
        for name in weight_names(model)
        if name.startswith(blocks)  # what stands beside a language model is no one's to quantize
        and not name.endswith(tuple(f".{part}" for part in _KEPT))
        and name not in _KEPT
        and dense_weight(model, name, experts).shape[1] % _MULTIPLE == 0
    ]
    if key == UNQUANTIZED:
        linears = [name for name in names if ".experts." not in name]
        name = next((name for name in linears if name.endswith(_OUTPUTS)), linears[0])
        return {name: _grid(8, 32)}
    found = {name: grids[key](name, _block_of(name)) for name in names}
    return {name: grid for name, grid in found.items() if grid is not None}


def _block_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
