"""A finished packed export as the formats of runtimes take it: one weight after another, whole models nowhere."""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moeq.checkpoint.affine import Readable
from moeq.checkpoint.model_class import model_class
from moeq.checkpoint.names import dense_weight, expert_leaves, split_expert_name, weight_names
from moeq.checkpoint.packed import PackedLinear
from moeq.checkpoint.packed_weight import PARTS, PackedFormat, dequantize_codes, unpacked_weight
from moeq.checkpoint.quantizer import METHOD
from moeq.disk.folder import check_integrity
from moeq.export.contents import Contents, read_contents
from moeq.models.experts import expert_modules, expert_weight, parameter_name, projections_of
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
        config = copy.deepcopy(packed.config)
        for key in _OWN_KEYS:
            if hasattr(config, key):
                delattr(config, key)
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
        return other_names(self.model)

    @cached_property
    def _experts(self) -> dict[str, nn.Module]:
        return expert_modules(self.model)

    def shape(self, name: str) -> tuple[int, int]:
        """Out and in features of a weight of a canonical name."""
        rows, columns = dense_weight(self.model, name, self._experts).shape
        return rows, columns

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the values of a weight of a canonical name: what the files have, which is that of its scales."""
        if name in self.grids:
            found: torch.dtype = self.contents.model.config.quantization_config.scale_dtype
            return found
        return self._tensors_of(name)[0].dtype

    def keys_of(self, names: Iterable[str]) -> list[str]:
        """Keys of the files' tensors that hold weights of canonical names, which may share them."""
        return list(dict.fromkeys(tensor.name for name in names for tensor in self._tensors_of(name)))

    def _tensors_of(self, name: str) -> list[Readable]:
        sources = self.contents.sources
        if (parts := split_expert_name(name, self._experts)) is not None and f"{name}.weight" not in sources:
            fused = f"{parts[0]}.{_parameter(self._experts[parts[0]], parts[2])}"
            if name not in self.grids:
                return [tensor for tensor, _ in sources[fused].tensors]
        made = [sources[f"{name}.{leaf}"] for leaf in ("weight", *PARTS) if f"{name}.{leaf}" in sources]
        return [tensor for source in made for tensor, _ in source.tensors]

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
        return next(self.weights([name]))

    def weights(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Values of several weights, see ``weight``; what lies in one tensor of the files is read once."""
        held, parts = "", dict[str, Tensor]()
        for name in names:
            if name in self.grids or f"{name}.weight" in self.contents.sources:
                yield self.weight(name)
                continue
            path, expert, leaf = split_expert_name(name, self._experts) or ("", 0, "")
            module, parameter = self._experts[path], _parameter(self._experts[path], leaf)
            if held != f"{path}.{parameter}":
                held = f"{path}.{parameter}"
                parts = dict(projections_of(module, parameter, self._stacked(held)))
            yield parts[f"{expert}.{leaf}.weight"]

    def tensor(self, name: str) -> Tensor:
        """A tensor of ``other_names``."""
        return self._value(name)

    def key(self, name: str) -> str:
        """Key in the files of a tensor of ``other_names``, or of a canonical name: what stands before ``.weight``."""
        sources = self.contents.sources
        for ending in (".weight_packed", ".weight"):
            if name in self.weight_names and name + ending in sources:
                return sources[name + ending].tensors[0][0].name.removesuffix(ending)
        if (parts := split_expert_name(name, self._experts)) is not None:  # kept with all others in one tensor
            return f"{self._paths[parts[0]]}.{parts[1]}.{self._leaves[parts[2]]}"
        return sources[name].tensors[0][0].name if name in sources else name

    @cached_property
    def _leaves(self) -> dict[str, str]:
        """Projections of experts as the source's files call them."""
        return expert_leaves(self.model)

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Experts modules as the source's files call them, where they hold experts one by one."""
        found = {path: path for path in self._experts}
        for path, module in self._experts.items():
            name = f"{path}.{parameter_name(module, 'down')}"
            empty = torch.empty_like(self.model.get_parameter(name), device="meta")
            for key in revert_weight_conversion(self.model, {name: empty}):
                if ".experts.0." in key:
                    found[path] = f"{key.partition('.experts.0.')[0]}.experts"
        return found

    def _stacked(self, name: str) -> Tensor:
        """A parameter of all experts, kept until another is asked for: they are asked for one by one."""
        if name not in self._last:
            self._last.clear()
            self._last[name] = self._value(name)
        return self._last[name]

    @cached_property
    def _last(self) -> dict[str, Tensor]:
        return {}

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
    """``model_stacks`` of an export."""
    return model_stacks(export.model)


def model_stacks(model: PreTrainedModel) -> dict[str, Sequence[str]]:
    """Canonical names by what runtimes hold as one tensor: all experts of one projection of a block, or one linear."""
    found: dict[str, list[str]] = {}
    experts = expert_modules(model)
    for name in weight_names(model):
        parts = split_expert_name(name, experts)
        found.setdefault(name if parts is None else f"{parts[0]}.{parts[2]}", []).append(name)
    return dict(found)


def other_names(model: PreTrainedModel) -> list[str]:
    """Names of every tensor of a dense model that belongs to no weight of a canonical name; tied ones once."""
    kept = remove_tied_weights_from_state_dict(model.state_dict(), model)
    taken = {f"{name}.weight" for name in weight_names(model)}
    for path, module in expert_modules(model).items():
        taken |= {f"{path}.{parameter_name(module, part)}" for part in ("into", "down")}
    return [name for name in kept if name not in taken]


def weight_shape(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """Out and in features of a weight of a canonical name."""
    experts = expert_modules(model)
    if (parts := split_expert_name(name, experts)) is None:
        rows, columns = model.get_parameter(f"{name}.weight").shape
        return rows, columns
    weight = expert_weight(experts[parts[0]], parts[1], parts[2])
    return weight.shape[0], weight.shape[1]


def _parameter(module: nn.Module, leaf: str) -> str:
    return parameter_name(module, "down" if leaf == "down_proj" else "into")
