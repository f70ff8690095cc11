"""What a checkpoint folder holds, source or export: its tensors by key, and which parameters of its model they make."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictInfo

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.configuration import load_config
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import packed_conversions
from moeq.checkpoint.quantizer import METHOD, MoEQConfig
from moeq.checkpoint.sources import Source, find_sources, made_of, stored_in
from moeq.export.assemble import packed_skeleton


@dataclass(frozen=True)
class Contents:
    """Tensors of a folder.

    Attributes:
        model: Of the folder, without values.
        stored: Every tensor of its files by key.
        sources: What parameters are made of, by the name of the (first) one.
    """

    model: PreTrainedModel
    stored: Mapping[str, Readable]
    sources: Mapping[str, Source]

    @cached_property
    def parameter_of(self) -> dict[str, str]:
        """The (first) parameter that a tensor is part of, by key; others are used by none."""
        return {tensor.name: name for name, source in self.sources.items() for tensor, _ in source.tensors}

    def values(self, name: str) -> dict[str, Tensor]:
        """Values of the parameters that are made with (the first) one of a name, by name.

        Raises:
            ValueError: Its tensors do not fit each other.
        """
        info = LoadStateDictInfo(
            missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), error_msgs=[], conversion_errors={},
            skipped_pp_keys=set(),
        )  # fmt: skip
        made = made_of(self.model, name, self.sources[name], info)
        if info.conversion_errors:
            raise ValueError(f"{name} could not be made of its tensors: {next(iter(info.conversion_errors.values()))}")
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def read_contents(folder: Path, *, trust_remote_code: bool = False) -> Contents:
    """Contents of a folder; no tensor is read.

    Args:
        folder: Of a source or an export.
        trust_remote_code: Run code that comes with it.

    Raises:
        ValueError: A file is missing or damaged.
    """
    model, mapping = empty_model(folder, trust_remote_code=trust_remote_code)
    stored = stored_in(folder)
    return Contents(model, stored, find_sources(model, stored, mapping))


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, list[Any]]:
    """The model of a folder without values, packed where the folder is, and the conversions from its files."""
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    description = getattr(config, "quantization_config", None)
    if description is None or description["quant_method"] != METHOD:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(
                config, dtype=config.dtype, trust_remote_code=trust_remote_code
            )
        return model, conversions(model)
    packing = MoEQConfig.from_dict(description)
    model = packed_skeleton(config, packing, config.dtype, trust_remote_code=trust_remote_code)
    return model, conversions(model)


def conversions(model: PreTrainedModel) -> list[Any]:
    """Conversions from the files of a checkpoint to its model, dense or packed."""
    mapping = get_model_conversion_mapping(model)
    quantization = getattr(model.config, "quantization_config", None)
    # By method, not by class: a module imported again (autoreload in notebooks) has another class of that name.
    if quantization is None or getattr(quantization, "quant_method", None) != METHOD:
        return mapping
    return packed_conversions(mapping, quantization.expert_leaves)
