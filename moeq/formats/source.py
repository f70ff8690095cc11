"""A finished packed export as the formats of runtimes take it: one weight after another, whole models nowhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import split_expert_name, weight_names
from moeq.checkpoint.packed import PackedFormat, PackedLinear, dequantize_codes, unpacked_weight
from moeq.checkpoint.quantizer import METHOD
from moeq.disk.folder import check_integrity
from moeq.export.contents import Contents, read_contents
from moeq.models.experts import expert_modules, parameter_name, projections_of
from moeq.quant.spec import QuantizedWeight

# Keys of config.json that say how this folder is packed; the rest is the source's.
_OWN_KEYS = ("quantization_config", "transformers_weights")


@dataclass(frozen=True)
class PackedExport:
    """A packed export, opened without reading a weight.

    Attributes:
        folder: Its folder.
        contents: Which tensors its files hold.
    """

    folder: Path
    contents: Contents

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as the source had it, in its dialect."""
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf8"))
        return {key: value for key, value in values.items() if key not in _OWN_KEYS}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model, without values (on the meta device)."""
        packed = self.contents.model
        config = type(packed.config).from_dict(self.config)
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(config, dtype=packed.dtype)
        return model

    @cached_property
    def grids(self) -> dict[str, PackedFormat]:
        """Grid of every quantized weight by canonical name, in the order of the model."""
        layers = self.contents.model.named_modules()
        grids = {name: module.grid for name, module in layers if isinstance(module, PackedLinear)}
        return {name: grids[name] for name in self.weight_names if name in grids}

    @cached_property
    def weight_names(self) -> list[str]:
        """Canonical names of everything that can be quantized, whether it is or not: linears, experts' projections."""
        return weight_names(self.model)

    @cached_property
    def other_names(self) -> list[str]:
        """Names in the dense model of every tensor that belongs to no name of ``weight_names``; tied ones once."""
        kept = remove_tied_weights_from_state_dict(self.model.state_dict(), self.model)
        taken = {f"{name}.weight" for name in self.weight_names}
        for path, module in self._experts.items():
            taken |= {f"{path}.{parameter_name(module, part)}" for part in ("into", "down")}
        return [name for name in kept if name not in taken]

    @cached_property
    def _experts(self) -> dict[str, nn.Module]:
        return expert_modules(self.model)

    def shape(self, name: str) -> tuple[int, int]:
        """Out and in features of a weight of a canonical name."""
        if (parts := split_expert_name(name, self._experts)) is None:
            rows, columns = self.model.get_parameter(f"{name}.weight").shape
            return rows, columns
        module, leaf = self._experts[parts[0]], parts[2]
        of = dict(projections_of(module, _parameter(module, leaf), module.get_parameter(_parameter(module, leaf))))
        rows, columns = of[f"{parts[1]}.{leaf}.weight"].shape
        return rows, columns

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes, scales and zero points of a quantized weight."""
        layer = self.contents.model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        parts = {part: self._value(f"{name}.{part}") for part, _ in layer.named_parameters() if part != "bias"}
        return unpacked_weight(parts, layer.grid, self.shape(name), layer.weight_dtype)

    def weight(self, name: str) -> Tensor:
        """Values of a weight of a canonical name, [O, I]: dequantized, or as it was kept."""
        if name in self.grids:
            return dequantize_codes(self.quantized(name))
        if f"{name}.weight" in self.contents.sources:
            return self._value(f"{name}.weight")
        path, expert, leaf = split_expert_name(name, self._experts) or ("", 0, "")
        stacked = self._value(f"{path}.{_parameter(self._experts[path], leaf)}")
        return dict(projections_of(self._experts[path], _parameter(self._experts[path], leaf), stacked))[
            f"{expert}.{leaf}.weight"
        ]

    def tensor(self, name: str) -> Tensor:
        """A tensor of ``other_names``."""
        return self._value(name)

    def key(self, name: str) -> str:
        """Key in the files of a tensor of ``other_names``, or of a canonical name: what stands before ``.weight``."""
        sources = self.contents.sources
        for ending in (".weight_packed", ".weight"):
            if name in self.weight_names and name + ending in sources:
                return sources[name + ending].tensors[0][0].name.removesuffix(ending)
        return sources[name].tensors[0][0].name if name in sources else name

    def _value(self, name: str) -> Tensor:
        return self.contents.values(name)[name]


def open_packed(folder: Path | str) -> PackedExport:
    """Open a packed export.

    Raises:
        ValueError: The folder is damaged, or is no packed export.
    """
    check_integrity(folder)
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf8"))
    if values.get("quantization_config", {}).get("quant_method") != METHOD:
        raise ValueError(f"{folder} is no packed export of moeq; give the folder export/ of a run")
    return PackedExport(Path(folder), read_contents(Path(folder)))


def stacks(export: PackedExport) -> dict[str, Sequence[str]]:
    """Canonical names by what runtimes hold as one tensor: all experts of one projection of a block, or one linear."""
    found: dict[str, list[str]] = {}
    for name in export.weight_names:
        parts = split_expert_name(name, export._experts)
        found.setdefault(name if parts is None else f"{parts[0]}.{parts[2]}", []).append(name)
    return dict(found)


def _parameter(module: nn.Module, leaf: str) -> str:
    return parameter_name(module, "down" if leaf == "down_proj" else "into")
