"""The quantization method "moeq" of transformers: opens a packed checkpoint with ``from_pretrained``, and stays packed.

Importing this module registers the method.  ``config.json`` then describes every weight: a template per kind of linear
(layer and expert indices replaced by ``*``) and the exceptions from it, so that any mix of widths is small on disk.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeq.checkpoint.names import packed_conversions, weight_names
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExpert, PackedExperts, PackedLinear
from moeq.checkpoint.packed_weight import PackedFormat
from moeq.checkpoint.prepare import prepare
from moeq.models.adapter import find_blocks
from moeq.models.experts import expert_modules, expert_weight, num_experts, projections

METHOD = "moeq"
# The version that is written, and the one of checkpoints with two-level grids, which earlier versions of moeq refuse.
CHECKPOINT_VERSION, TWO_LEVEL_VERSION = 1, 2
# Name of the weight files in ``config.json`` of a packed checkpoint.  transformers without moeq would skip the method
# with a warning and make random weights; it refuses this name, and shows it.
OPENING = (
    "none. This checkpoint is packed by moeq and transformers alone cannot read it: install moeq and run "
    "`import moeq.checkpoint.quantizer` before from_pretrained"
)
_WEIGHTS = "transformers_weights"
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


class MoEQConfig(QuantizationConfigMixin):
    """Which weights of a checkpoint are packed, on which grids, and under which names.

    Args:
        templates: Grid of each kind of weight, {"model.layers.*.mlp.experts.*.up_proj": {"bits": 3, ...}}.
        exceptions: Grid of each weight that deviates from its template; None for one that is not quantized.
        weight_dtype: Dtype of the scales and of the dequantized weights, for example "bfloat16".
        expert_leaves: File names of the expert projections where they are not gate_proj, up_proj and down_proj.
        metadata: Anything serialisable about how the weights were made.
        quant_method: Always "moeq".
        format_version: Version of this description.
        **newer: Keys of a newer version; only allowed together with it, to give the message below.

    Raises:
        ValueError: The description is of a newer version, or has unknown keys.
    """

    def __init__(
        self,
        templates: dict[str, dict[str, Any]],
        exceptions: dict[str, dict[str, Any] | None],
        weight_dtype: str,
        expert_leaves: dict[str, str] | None = None,
        metadata: dict[str, Any] | None = None,
        quant_method: str = METHOD,
        format_version: int = CHECKPOINT_VERSION,
        **newer: Any,
    ) -> None:
        if format_version > TWO_LEVEL_VERSION or newer:
            raise ValueError(
                f"the checkpoint has moeq format {format_version} (unknown keys: {sorted(newer)}); "
                f"this version reads formats up to {TWO_LEVEL_VERSION}; update moeq"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.weight_dtype = weight_dtype
        self.templates = templates
        self.exceptions = exceptions
        self.expert_leaves = expert_leaves or {}
        self.metadata = metadata or {}

    @classmethod
    def from_grids(
        cls,
        grids: dict[str, PackedFormat],
        candidates: Iterable[str],
        *,
        weight_dtype: torch.dtype,
        expert_leaves: dict[str, str],
        metadata: dict[str, Any],
    ) -> "MoEQConfig":
        """Describe ``grids`` (by canonical name) compactly.

        Args:
            grids: Grid of each quantized weight.
            candidates: Names of all weights of the model that could be quantized.
            weight_dtype: Dtype of the scales.
            expert_leaves: File names of the expert projections.
            metadata: Kept as it is.
        """
        kinds: dict[str, Counter[PackedFormat]] = defaultdict(Counter)
        for name, grid in grids.items():
            kinds[_template(name)][grid] += 1
        usual = {kind: counts.most_common(1)[0][0] for kind, counts in kinds.items()}
        exceptions = {
            name: grids[name].to_dict() if name in grids else None
            for name in candidates
            if _template(name) in usual and grids.get(name) != usual[_template(name)]
        }
        uniform = all(grid.kind == "uniform" for grid in grids.values())
        return cls(
            templates={kind: grid.to_dict() for kind, grid in usual.items()},
            exceptions=exceptions,
            weight_dtype=str(weight_dtype).removeprefix("torch."),
            expert_leaves={leaf: name for leaf, name in expert_leaves.items() if leaf != name},
            metadata=metadata,
            format_version=CHECKPOINT_VERSION if uniform else TWO_LEVEL_VERSION,
        )

    def grid(self, name: str) -> PackedFormat | None:
        """Grid of a weight by canonical name; None for one that is not quantized."""
        entry = self.exceptions[name] if name in self.exceptions else self.templates.get(_template(name))
        return None if entry is None else PackedFormat(**entry)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales."""
        dtype = getattr(torch, self.weight_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class MoEQuantizer(HfQuantizer):
    """Replaces linears and experts by their packed modules before transformers loads the checkpoint."""

    requires_calibration = True
    quantization_config: MoEQConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Let transformers look for the usual files; this is where a quantizer sees the configuration first."""
        vars(config).pop(_WEIGHTS, None)
        return config

    update_tp_plan = update_attn_implementation  # which is that hook in 5.17

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        install_packed_modules(model, self.quantization_config)
        self._declared = {name: p.dtype for name, p in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.requires_grad_(False)  # loading makes floating-point parameters trainable
            elif isinstance(module, PreTrainedModel):
                # Some models (jamba) then compute another way, with other roundings, for linears that have no weight.
                vars(module.config).pop("_is_quantized", None)
        # 5.17 leaves renamed tensors of a quantized checkpoint in the dtype of the file, whatever dtype was asked for.
        float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            # Parts of a path, one or several: "gate.weight" is part of "mlp.gate.weight", not of "gate.weight_scale".
            if not any(f".{part}." in f".{name}." for part in float32):
                parameter.data = parameter.data.to(self._declared.get(name, parameter.dtype))
        if model.config.get_text_config()._experts_implementation == IMPLEMENTATION:
            prepare(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Conversions for the packed names; newer versions of transformers pass the model, 5.17 does not."""
        return packed_conversions(weight_conversions, self.quantization_config.expert_leaves)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A packed model can be saved again: its tensors are its parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are integers; there is nothing to train."""
        return False


def install_packed_modules(model: PreTrainedModel, config: MoEQConfig) -> None:
    """Replace, on the meta device, every linear and every experts module of ``model`` that ``config`` has packed.

    Once any expert is packed, all experts modules become lists of experts, since their checkpoint keys are then read
    one by one; projections that are not quantized become plain linears in them.
    """
    grids = {name: grid for name in weight_names(model) if (grid := config.grid(name)) is not None}
    blocks, _ = find_blocks(model)  # a tower of images may have experts, too, which stay as they are
    experts = {path: module for path, module in expert_modules(model).items() if path.startswith(f"{blocks}.")}
    with torch.device("meta"):
        for name, grid in grids.items():
            if not any(name.startswith(f"{path}.") for path in experts):
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                bias_dtype = None if linear.bias is None else linear.bias.dtype
                packed = PackedLinear(linear.in_features, linear.out_features, grid, config.scale_dtype, bias_dtype)
                model.set_submodule(name, packed)
        if any(name.startswith(f"{path}.") for path in experts for name in grids):
            for path, module in experts.items():
                model.set_submodule(path, _packed_experts(path, module, grids, config.scale_dtype))
                # Some families (qwen3_omni_moe) initialise the fused weights, which are gone, from the block around.
                model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True


def _packed_experts(
    path: str, source: nn.Module, grids: dict[str, PackedFormat], scale_dtype: torch.dtype
) -> PackedExperts:
    def projection(expert: int, leaf: str) -> nn.Module:
        weight = expert_weight(source, expert, leaf)
        rows, columns = weight.shape
        grid = grids.get(f"{path}.{expert}.{leaf}")
        if grid is None:
            return nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
        return PackedLinear(columns, rows, grid, scale_dtype)

    leaves = projections(source)
    experts = [PackedExpert(**{leaf: projection(e, leaf) for leaf in leaves}) for e in range(num_experts(source))]
    return PackedExperts(source, experts)


def _template(name: str) -> str:
    return _INDEX.sub("*", name)


def _register() -> None:
    """Register the method; registering again (a reloaded module) replaces the classes."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    register_quantization_config(METHOD)(MoEQConfig)
    register_quantizer(METHOD)(MoEQuantizer)


_register()
