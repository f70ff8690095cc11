"""Exports by way of whole models and ``save_pretrained``: the obvious reference of what is written block by block.

And codes for tests: of most weights that a fit quantizes, held in a dictionary.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.names import dense_conversions, dense_weight, expert_leaves, packed_conversions, weight_names
from moeq.checkpoint.packed import PackedExperts
from moeq.checkpoint.packed_weight import packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig
from moeq.export.assemble import packed_format, packed_skeleton
from moeq.models.adapter import Adapter
from moeq.models.experts import expert_modules, expert_weight, num_experts, parameter_name, projections
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight, round_weight

GRIDS = ((3, 8, False), (4, None, True), (2, 8, False), (8, None, False), (4, 8, True))


def make_codes(adapter: Adapter, *, keep_every: int = 7) -> dict[str, QuantizedWeight]:
    """Codes of the weights of all sites of a model in memory, without each ``keep_every``-th."""
    grids, codes, count = itertools.cycle(GRIDS), {}, 0
    for site in adapter.all_sites():
        weight_EOI = adapter.get_weight(site)
        for expert, weight_OI in enumerate(weight_EOI):
            for leaf, rows in zip(site.leaves, weight_OI.split(site.rows), strict=True):
                if (count := count + 1) % keep_every:
                    codes[site.weight_name(expert, leaf)] = round_weight(rows, *next(grids))
    return codes


class DictBlocks:
    """What a fit has made of blocks, in memory; committed anew whenever a block is asked for."""

    def __init__(self, adapter: Adapter, quantized: Mapping[str, QuantizedWeight]) -> None:
        self._adapter, self._quantized = adapter, quantized

    def quantized(self, block: int) -> dict[str, QuantizedWeight]:
        path = f"{self._adapter.block_prefix}.{block}."
        return {name: weight for name, weight in self._quantized.items() if name.startswith(path)}

    def commit(self, block: int) -> None:
        experts = expert_modules(self._adapter.model)
        for name, weight in self.quantized(block).items():
            dense_weight(self._adapter.model, name, experts).copy_(real_weight(weight))


def save_packed_whole(
    model: PreTrainedModel, quantized: dict[str, QuantizedWeight], folder: Path, max_shard_size: str = "5GB"
) -> None:
    """The packed model with every tensor in memory, saved by transformers."""
    leaves = expert_leaves(model)
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    dtype = next(iter(quantized.values())).scale_OG.dtype
    config = MoEQConfig.from_grids(
        grids, weight_names(model), weight_dtype=dtype, expert_leaves=leaves, metadata={"seed": 7}
    )
    packed = packed_skeleton(model.config, config, model.dtype)
    packed.load_state_dict(_packed_state(model, packed, quantized), strict=True, assign=True)
    packed.generation_config = model.generation_config
    packed._weight_conversions = packed_conversions(dense_conversions(model), leaves)
    packed.save_pretrained(folder, max_shard_size=max_shard_size)


def _packed_state(model: nn.Module, packed: nn.Module, quantized: dict[str, QuantizedWeight]) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    for path, module in expert_modules(model).items():
        if isinstance(packed.get_submodule(path), PackedExperts):
            for part in ("into", "down"):
                del tensors[f"{path}.{parameter_name(module, part)}"]
            for expert in range(num_experts(module)):
                for leaf in projections(module):
                    weight_OI = expert_weight(module, expert, leaf)
                    tensors[f"{path}.{expert}.{leaf}.weight"] = weight_OI.detach().clone()
    for name, weight in quantized.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed_tensors(weight).items()}
    return tensors
