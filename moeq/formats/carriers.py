"""Storage types of a format for all weights of a model, and which of them must be alike."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import version

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moeq.checkpoint.names import dense_weight, split_expert_name, weight_names
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.models.experts import expert_modules, parameter_name
from moeq.quant.carrier import Carrier, CarrierMode, FormatName, choose_carrier


def choose_carriers(
    format_name: FormatName, model: PreTrainedModel, grids: Mapping[str, PackedFormat], mode: CarrierMode
) -> dict[str, Carrier]:
    """Storage type of each quantized weight, by canonical name.

    Args:
        format_name: The format.
        model: Dense model, with or without values.
        grids: Of the quantized weights.
        mode: "exact" or "native".

    Raises:
        ValueError: The format has none for a weight, which is named.
    """
    experts, found = expert_modules(model), {}
    for name, grid in grids.items():
        in_features = dense_weight(model, name, experts).shape[1]
        try:
            found[name] = choose_carrier(format_name, grid.spec, in_features, mode)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; quantize it on such a grid, or leave it as it is") from error
    return found


def check_alike(carriers: Mapping[str, Carrier], unit: Sequence[str], reason: str) -> None:
    """Raise ValueError where weights that a runtime reads in one way are stored in several.

    Args:
        carriers: Storage types by name; weights without one are kept as they are.
        unit: Names.
        reason: Who reads them so, for the message.
    """
    first = carriers.get(unit[0])
    for name in unit:
        if carriers.get(name) != first:
            raise ValueError(
                f"{name} is {_words(carriers.get(name))}, {unit[0]} is {_words(first)}: {reason}; give them one grid"
            )


def check_experts_apart(
    model: PreTrainedModel, carriers: Mapping[str, Carrier], format_name: FormatName, taken_apart: Collection[str] = ()
) -> None:
    """Raise ValueError where experts are quantized that no runtime reads one by one.

    Args:
        model: Dense model.
        carriers: Storage types by name.
        format_name: For the message.
        taken_apart: Families whose experts the runtime has one by one, though their files have not.
    """
    experts, family = expert_modules(model), model.config.model_type
    first = {
        parts[0]: name for name in reversed(list(carriers)) if (parts := split_expert_name(name, experts)) is not None
    }
    for path, name in first.items():
        if getattr(experts[path], "has_bias", False):
            raise ValueError(
                f"{path} has biases, which no runtime reads beside experts in {format_name}; choose gguf, or leave the "
                "experts as they are"
            )
        if family not in taken_apart and not _are_apart(model, f"{path}.{parameter_name(experts[path], 'down')}"):
            raise ValueError(
                f"{name} lies with all experts in one tensor of the source's files, and no runtime reads packed "
                f"experts of {family} in another way; choose gguf or mlx, or leave the experts as "
                "they are"
            )


def _are_apart(model: PreTrainedModel, parameter: str) -> bool:
    """Whether the files of a family hold what is a parameter of all experts one by one."""
    empty = torch.empty_like(model.get_parameter(parameter), device="meta")
    return any(".experts.0." in key for key in revert_weight_conversion(model, {parameter: empty}))


def expert_blocks(model: PreTrainedModel) -> list[list[str]]:
    """Canonical names of all projections of the routed experts, by block."""
    experts = expert_modules(model)
    found: dict[str, list[str]] = {path: [] for path in experts}
    for name in weight_names(model):
        if (parts := split_expert_name(name, experts)) is not None:
            found[parts[0]].append(name)
    return list(found.values())


def count_types(labels: Iterable[str]) -> dict[str, int]:
    """How many weights have which type, the most frequent first."""
    return dict(Counter(labels).most_common())


def version_of(package: str) -> str:
    """A package with its version, as a report names a reader."""
    return f"{package} {version(package)}"


def _words(carrier: Carrier | None) -> str:
    if carrier is None:
        return "kept as it is"
    groups = "per channel" if carrier.group_size is None else f"groups of {carrier.group_size}"
    return f"{carrier.name} ({groups})"
