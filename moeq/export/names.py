"""Names of weights: canonical ones inside moeq, module parameters of transformers, and keys of checkpoint files.

The canonical name of an expert's weight inserts the index of the expert into the module path
(``model.layers.0.mlp.experts.3.gate_proj``); files use what the family was published with
(``model.layers.0.block_sparse_moe.experts.3.w1.weight_packed``).  The translation is read off transformers' own
conversion mapping, by letting it take apart small tensors of labels; families whose files hold all experts in one
tensor keep the canonical names.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from moeq.kernels.packed import PROJECTIONS
from moeq.models.adapter import is_experts_module

_EXPERT_WEIGHT = re.compile(rf"(?P<path>.+)\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(PROJECTIONS)})")
_EXPERT_KEY = re.compile(r".+\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules by path."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def check_expressible(model: PreTrainedModel) -> None:
    """Raise ValueError where the experts of ``model`` cannot be written as plain gate, up and down projections."""
    for path, module in expert_modules(model).items():
        reasons = {
            "are stored packed already": not hasattr(module, "down_proj"),
            "have no gate projection": not module.has_gate,
            "are stored transposed": bool(module.is_transposed),
            "have interleaved gate and up rows": not getattr(module, "is_concatenated", True),
            "have biases": bool(getattr(module, "has_bias", False)),
            "are followed by a norm of each expert": bool(getattr(module, "has_post_expert_norm", False)),
        }
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            raise ValueError(
                f"{model.config.model_type} is not supported because its experts ({path}) {' and '.join(found)}; "
                "choose a family with plain experts, for example qwen3_moe, mixtral, olmoe or deepseek_v3"
            )


def weight_names(model: nn.Module) -> list[str]:
    """Canonical names of everything a packed checkpoint can hold packed: plain linears and expert projections."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for path, module in expert_modules(model).items():
        names += [f"{path}.{e}.{leaf}" for e in range(num_experts(module)) for leaf in PROJECTIONS]
    return names


def split_expert_name(name: str, experts: dict[str, nn.Module]) -> tuple[str, int, str] | None:
    """Path of the experts module, expert index and projection of a canonical name; None if it is no expert's."""
    match = _EXPERT_WEIGHT.fullmatch(name)
    if match is None or match["path"] not in experts:
        return None
    return match["path"], int(match["expert"]), match["leaf"]


def num_experts(module: nn.Module) -> int:
    """E of an experts module."""
    return int(module.num_experts)  # type: ignore[arg-type]


def expert_weight(module: nn.Module, expert: int, leaf: str) -> Tensor:
    """One projection of one expert of a dense experts module, [O, I] (a view)."""
    if leaf == "down_proj":
        return module.down_proj[expert]  # type: ignore[index]
    gate, up = module.gate_up_proj[expert].chunk(2, dim=0)  # type: ignore[index]
    return gate if leaf == "gate_proj" else up


def dense_weight(model: nn.Module, name: str, experts: dict[str, nn.Module]) -> Tensor:
    """Weight of a canonical name in a dense model, [O, I] (a view); raises ValueError for an unknown name."""
    parts = split_expert_name(name, experts)
    if parts is not None and parts[1] < num_experts(experts[parts[0]]):
        return expert_weight(experts[parts[0]], parts[1], parts[2]).detach()
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is not nn.Linear:
        raise ValueError(f"{name} is not a linear of {type(model).__name__}, nor a projection of one of its experts")
    return module.weight.detach()


def expert_leaves(model: PreTrainedModel) -> dict[str, str]:
    """File names of the expert projections, {"gate_proj": "w1", ...}; the canonical ones where files are fused.

    transformers splits its fused parameters for ``save_pretrained``; given labels in the place of weights, what comes
    back tells which file key holds which projection.
    """
    leaves = {leaf: leaf for leaf in PROJECTIONS}
    for path, module in expert_modules(model).items():
        into_label, down_label = torch.tensor([[0], [1]]), torch.tensor([[2]])
        count = num_experts(module)
        labels = {
            f"{path}.gate_up_proj": into_label.expand(count, 2, 1).clone(),
            f"{path}.down_proj": down_label.expand(count, 1, 1).clone(),
        }
        for key, label in revert_weight_conversion(model, labels).items():
            match = _EXPERT_KEY.fullmatch(key)
            if match is not None and label.numel() == 1:
                leaves[PROJECTIONS[int(label)]] = match["leaf"]
        break  # one family, one spelling
    return leaves


def packed_conversions(conversions: list[Any], leaves: dict[str, str]) -> list[Any]:
    """Conversions between a packed checkpoint and a packed model.

    Experts stay apart, so that the converters that merge them go, and each projection is renamed instead.

    Args:
        conversions: transformers' conversions for the dense model, in loading direction.
        leaves: File names of the expert projections, see ``expert_leaves``.
    """
    kept = [c for c in conversions if not (isinstance(c, WeightConverter) and _merges_experts(c))]
    renamed = [
        WeightRenaming(rf"(\.experts\.\d+)\.{leaf}\.", rf"\1\.{projection}\.")
        for projection, leaf in leaves.items()
        if leaf != projection
    ]
    return kept + renamed


def dense_conversions(model: PreTrainedModel) -> list[Any]:
    """Conversions that ``save_pretrained`` would revert: those used in loading, or the family's default."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    default = get_model_conversion_mapping(model, add_legacy=False)
    # A model made from a config has no prefix to restore (as in transformers' own revert_weight_conversion).
    return [conversion for conversion in default if not isinstance(conversion, PrefixChange)]


def module_keys(keys: list[str], model: PreTrainedModel, conversions: list[Any]) -> dict[str, str]:
    """Parameter of the packed ``model`` that each key of a packed checkpoint file belongs to."""
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    return {key: str(rename_source_key(key, renamings, [], prefix, parameters)[0]) for key in keys}


def _merges_experts(converter: Any) -> bool:
    return any("experts.*" in pattern for pattern in converter.source_patterns)
