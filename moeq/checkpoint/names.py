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

from moeq.models.experts import (
    PROJECTIONS,
    ExpertSide,
    as_stored,
    expert_modules,
    expert_weight,
    layout_problem,
    num_experts,
    parameter_name,
    projections,
)

_EXPERT_WEIGHT = re.compile(rf"(?P<path>.+)\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(PROJECTIONS)})")
_EXPERT_KEY = re.compile(r".+\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")


def check_expressible(model: PreTrainedModel) -> None:
    """Raise ValueError where the experts of ``model`` cannot be written one by one."""
    for path, module in expert_modules(model).items():
        if problem := layout_problem(module):
            raise ValueError(
                f"{model.config.model_type} is not supported because {path} {problem}; "
                "docs/families.md lists the families that are"
            )


def weight_names(model: nn.Module) -> list[str]:
    """Canonical names of everything a packed checkpoint can hold packed: plain linears and expert projections."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for path, module in expert_modules(model).items():
        names += [f"{path}.{e}.{leaf}" for e in range(num_experts(module)) for leaf in projections(module)]
    return names


def split_expert_name(name: str, experts: dict[str, nn.Module]) -> tuple[str, int, str] | None:
    """Path of the experts module, expert index and projection of a canonical name; None if it is no expert's."""
    match = _EXPERT_WEIGHT.fullmatch(name)
    if match is None or match["path"] not in experts:
        return None
    return match["path"], int(match["expert"]), match["leaf"]


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
        into, count = projections(module)[:-1], num_experts(module)
        labels = {}
        parts: tuple[tuple[ExpertSide, tuple[str, ...]], ...] = (("into", into), ("down", ("down_proj",)))
        for part, leaves_of_part in parts:
            label_OI = torch.tensor([[PROJECTIONS.index(leaf)] for leaf in leaves_of_part])
            stored = as_stored(module, part, label_OI.expand(count, len(leaves_of_part), 1))
            labels[f"{path}.{parameter_name(module, part)}"] = stored
        for key, label in revert_weight_conversion(model, labels).items():
            match = _EXPERT_KEY.fullmatch(key)
            if match is not None and label.numel() == 1:
                leaves[PROJECTIONS[int(label)]] = match["leaf"]
        break  # one family, one spelling
    return leaves


def owned_weights(parameter: str, key: str, experts: dict[str, nn.Module], leaves: dict[str, str]) -> list[str]:
    """Canonical names of the weights of which a tensor of a file is a part, or which are parts of it.

    Args:
        parameter: Of the dense model that the tensor belongs to.
        key: Of the tensor.
        experts: Experts modules by path.
        leaves: File names of the expert projections, see ``expert_leaves``.
    """
    path, _, leaf = parameter.rpartition(".")
    if path not in experts:
        return [path] if leaf == "weight" else []
    module = experts[path]
    if leaf not in (parameter_name(module, "into"), parameter_name(module, "down")):
        return []
    canonical = {name: projection for projection, name in leaves.items()}
    if (match := _EXPERT_KEY.fullmatch(key)) and match["leaf"] in canonical:
        return [f"{path}.{int(match['expert'])}.{canonical[match['leaf']]}"]
    chosen = ("down_proj",) if leaf == "down_proj" else projections(module)[:-1]
    return [f"{path}.{expert}.{name}" for expert in range(num_experts(module)) for name in chosen]


def packed_conversions(conversions: list[Any], leaves: dict[str, str]) -> list[Any]:
    """Conversions between a packed checkpoint and a packed model.

    Experts stay apart, so that the converters that merge them go, and each projection is renamed instead.  Those that
    merge other linears of the same names leave experts alone.

    Args:
        conversions: transformers' conversions for the dense model, in loading direction.
        leaves: File names of the expert projections, see ``expert_leaves``.
    """
    kept = [_of_no_expert(c) for c in conversions if not (isinstance(c, WeightConverter) and _merges_experts(c))]
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
        return [_narrowed(conversion) for conversion in used]
    default = get_model_conversion_mapping(model, add_legacy=False)
    # A model made from a config has no prefix to restore (as in transformers' own revert_weight_conversion).
    return [_narrowed(conversion) for conversion in default if not isinstance(conversion, PrefixChange)]


def module_keys(keys: list[str], model: PreTrainedModel, conversions: list[Any]) -> dict[str, str]:
    """Parameter of the packed ``model`` that each key of a packed checkpoint file belongs to."""
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    return {key: str(rename_source_key(key, renamings, [], prefix, parameters)[0]) for key in keys}


def _narrowed(conversion: Any) -> Any:
    """A conversion that, reverted, renames no more than it did in loading."""
    # Of Kimi K2.5 (transformers 5.23): meant for the vision tower, it would rename the language model's layers, too.
    if isinstance(conversion, WeightRenaming) and list(conversion.source_patterns) == ["blocks"]:
        return WeightRenaming("vision_tower.blocks", "vision_tower.layers")
    return conversion


def _of_no_expert(conversion: Any) -> Any:
    """A conversion; a converter of linears whose patterns are also in names of single experts passes over these."""
    names = [f".experts.0.{projection}.weight" for projection in PROJECTIONS]
    patterns = list(conversion.source_patterns)
    if not isinstance(conversion, WeightConverter) or not any(re.search(p, name) for p in patterns for name in names):
        return conversion
    # The number of an expert stands before its projection.
    apart = [rf"(?<!\d){pattern}" for pattern in patterns]
    return conversion.copy(apart, list(conversion.target_patterns), operations=conversion.operations)


def _merges_experts(converter: Any) -> bool:
    """Whether a converter makes fused experts of the language model; those of a tower are never packed."""
    scope = (getattr(converter, "scope_prefix", None) or "").rpartition(".")[2]
    return scope in ("", "model", "language_model") and any("experts.*" in part for part in converter.source_patterns)
