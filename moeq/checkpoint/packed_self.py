"""A model rounded to few bits in memory, made of its blocks one at a time: what can still write where the model itself
does not fit.

Weights are rounded to nearest in groups (below 8 bits with the search of clipping ranges); routers, norms, embeddings,
head and whatever else a run keeps from quantization are exact.  The result runs as the family's own model does
(``moeq.checkpoint.packed``).  While it is made, one dense block is in memory beside it.

Legend: E experts, O out, I in.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeq.checkpoint.model_class import model_class, runs_code
from moeq.checkpoint.names import weight_names
from moeq.checkpoint.packed_weight import PackedFormat, packed_tensors
from moeq.checkpoint.quantizer import MoEQConfig, install_packed_modules
from moeq.checkpoint.release import release_memory
from moeq.models.adapter import Adapter
from moeq.models.experts import ExpertSide, parameter_name
from moeq.models.sites import Site
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, QuantizedWeight

GROUP_SIZES = (64, 32, 16)


def packed_self(adapter: Adapter, bits: int) -> PreTrainedModel:
    """The model of an adapter with all weights that a run quantizes rounded and packed; the model stays as it is.

    Args:
        adapter: Of a model of transformers, in memory or streamed; its blocks are made resident in turn.
        bits: Of every weight, 1 to 8.

    Returns:
        A model in evaluation mode on the device of the blocks.  What lies outside of the blocks is shared.
    """
    model = adapter.model
    assert isinstance(model, PreTrainedModel)
    packed = _skeleton(adapter, bits)
    inside = f"{adapter.block_prefix}."
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for block in range(len(adapter.blocks)):
        adapter.residency.read_ahead(block + 1)
        with adapter.resident(block):
            tensors |= _block_tensors(adapter, block, bits)
        release_memory(model.get_input_embeddings().weight.device)
    packed.load_state_dict(tensors, strict=True, assign=True)
    _share_unsaved_buffers(model, packed)
    return packed.eval().requires_grad_(False)


def packed_bytes(adapter: Adapter, bits: int) -> int:
    """Bytes of the tensors of ``packed_self``, told from shapes alone."""
    total = sum(tensor.nbytes for tensor in (*adapter.model.parameters(), *adapter.model.buffers()))
    for site in adapter.all_sites():
        grid = _grid(site, bits)
        num_rows = site.num_experts * sum(site.rows)
        num_groups = num_rows * grid.num_groups(site.in_features)
        num_weights = num_rows * site.in_features
        total -= num_weights * adapter.dtype_of(site).itemsize
        total += (num_weights + num_groups) * bits // 8 + num_groups * adapter.storage_dtype.itemsize
    return total


def _grid(site: Site, bits: int) -> GridSpec:
    """Groups of 64, or of fewer where 64 does not divide the inputs of a site.

    At 8 bits a search of clipping ranges finds those of min-max again, in six times the time.
    """
    fitting = (size for size in GROUP_SIZES if site.in_features % size == 0)
    return GridSpec(bits, next(fitting, None), clip_search=bits < 8)


def _skeleton(adapter: Adapter, bits: int) -> PreTrainedModel:
    """The packed model without values, on the meta device."""
    model = adapter.model
    assert isinstance(model, PreTrainedModel)
    formats: dict[str, PackedFormat] = {}
    for site in adapter.all_sites():
        grid = _grid(site, bits)
        formats |= dict.fromkeys(site.weight_names(), PackedFormat.of(grid))
    config = MoEQConfig.from_grids(
        formats, weight_names(model), weight_dtype=adapter.storage_dtype, expert_leaves={}, metadata={}
    )
    with torch.device("meta"):
        skeleton: PreTrainedModel = model_class(model.config).from_config(
            copy.deepcopy(model.config), dtype=model.dtype, trust_remote_code=runs_code(model)
        )
    install_packed_modules(skeleton, config)
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton


def _block_tensors(adapter: Adapter, block: int, bits: int) -> dict[str, Tensor]:
    """Values of a block of the packed model by name; the block is resident, and nothing is shared with it."""
    tensors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    for site in adapter.sites(block):
        replaced |= _parameters(adapter, site)
        for name, weight in _rounded(adapter, site, bits):
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed_tensors(weight).items()}
    prefix = f"{adapter.block_prefix}.{block}"
    exact = adapter.blocks[block].state_dict(prefix=f"{prefix}.")
    return tensors | {name: tensor.clone() for name, tensor in exact.items() if name not in replaced}


def _parameters(adapter: Adapter, site: Site) -> set[str]:
    """Names of the dense parameters that a site stands for."""
    if site.kind != "routed":
        return {f"{path}.weight" for path in site.modules}
    (path,) = site.modules
    part: ExpertSide = "down" if site.stage == "mlp_down" else "into"
    return {f"{path}.{parameter_name(adapter.model.get_submodule(path), part)}"}


def _rounded(adapter: Adapter, site: Site, bits: int) -> Iterator[tuple[str, QuantizedWeight]]:
    """Every weight of a site by canonical name; one expert at a time, so that little is unpacked at once."""
    grid = _grid(site, bits)
    for expert in range(site.num_experts):
        weight_1OI = adapter.get_weight(site, [expert] if site.kind == "routed" else None)
        solution = round_to_nearest(weight_1OI, grid, adapter.storage_dtype)
        start = 0
        for leaf, num_rows in zip(site.leaves, site.rows, strict=True):
            rows = slice(start, start + num_rows)
            yield site.weight_name(expert, leaf), solution.expert(0, grid, rows)
            start += num_rows


def _share_unsaved_buffers(model: nn.Module, packed: nn.Module) -> None:
    """Give the packed model what no file holds, such as rotary frequencies."""
    for name, buffer in model.named_non_persistent_buffers():  # type: ignore[operator]
        path, _, leaf = name.rpartition(".")
        packed.get_submodule(path)._buffers[leaf] = buffer
