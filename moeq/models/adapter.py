"""The adapter of a Mixture-of-Experts model: where its quantizable weights are, and which inputs feed them.

The algorithms see a model as a sequence of blocks, and a block as a tuple of *sites*.  A site is one input that feeds
one or more linears: they share a Hessian and are solved stacked along the out-features.  The weights of every site
have the shape [E, O, I]: E experts for a routed site, E = 1 for every other linear.

Routed experts are found by the experts interface of transformers v5 (``has_gate``, ``is_transposed``), never by the
name of the family; how they are stored is known to ``experts.py`` alone.  What families call their routers, gates and
linears stands in ``families.py``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from moeq.models.experts import (
    ExpertSide,
    as_stored,
    expert_modules,
    is_experts_module,
    layout_problem,
    parameter_name,
    stacked_weight,
    write_stacked,
)
from moeq.models.families import STAGES, other_experts, refusal, shared_gate
from moeq.models.not_quantized import is_router, is_router_part, kept_reason
from moeq.models.residency import InMemory, Residency
from moeq.models.sites import Site, linear_sites, routed_sites
from moeq.models.storage import rounded_to_storage, storage_dtype
from moeq.quant.spec import Fallback, WeightKind

__all__ = ["STAGES", "Adapter", "Site", "WeightKind", "find_blocks", "is_experts_module", "own_parameter"]

# A matrix of these is no matrix product with a whole input.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a module itself has under a name; None where it has none, or None in its place."""
    return dict(module.named_parameters(recurse=False)).get(name)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: those of the language model, which hold experts where any list does.

    Raises:
        ValueError: The model has no list of blocks.
    """
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    lists, inside = {}, ""
    for name, module in model.named_modules():
        if module is decoder:
            inside = name
        if isinstance(layers := module._modules.get("layers"), nn.ModuleList):
            lists[f"{name}.layers".removeprefix(".")] = layers
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks named 'layers'; give a language model")
    # Towers of images and sound have lists of their own, which may come first, and may even hold experts.
    path = min(lists, key=lambda path: (not _holds_experts(lists[path]), not path.startswith(inside)))
    return path, lists[path]


def _holds_experts(layers: nn.ModuleList) -> bool:
    return any(is_experts_module(module) for module in layers.modules())


class Adapter:
    """Answers where things are in one model, whose modules stay the ones it was made with.

    Where its parameters are, on the meta device for example, matters only to what reads, writes or runs weights: that
    happens while their block is ``resident``.

    Args:
        model: A causal LM of transformers v5.
        residency: Where the weights of its blocks are; None is in memory, all of them.

    Raises:
        ValueError: The model has no routed experts, experts that cannot be taken apart, or blocks that cannot be run
            one at a time.
    """

    def __init__(self, model: nn.Module, residency: Residency | None = None) -> None:
        self.model = model
        self.block_prefix, self.blocks = find_blocks(model)
        self.residency = residency or InMemory(model, len(self.blocks))
        self._sites: dict[int, tuple[Site, ...]] = {}
        self._experts = experts = {
            path: module for path, module in expert_modules(model).items() if path.startswith(f"{self.block_prefix}.")
        }
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if not experts:
            how = other_experts(getattr(model, "config", None))
            raise ValueError(
                f"{family} has no routed experts, or experts that do not follow the transformers experts interface"
                f"{f' ({how})' if how else ''}; "
                "moeq quantizes Mixture-of-Experts models such as qwen2_moe, qwen3_moe, mixtral, deepseek_v3 or olmoe"
            )
        problems = [f"{path} {why}" for path, module in experts.items() if (why := layout_problem(module))]
        problems += [why] if (why := refusal(getattr(model, "config", None))) else []
        if problems:
            raise ValueError(
                f"{family} cannot be quantized by moeq: {problems[0]}; docs/families.md lists the families that can"
            )

    def resident(self, block: int) -> AbstractContextManager[None]:
        """Within, the weights of a block are on the device; see ``moeq.models.residency``."""
        return self.residency.resident(block)

    def expert_modules(self) -> dict[str, nn.Module]:
        """Every experts module by path, in block order."""
        return dict(self._experts)

    def sites(self, block: int) -> tuple[Site, ...]:
        """Sites of one block in the order of its data flow (stages, then position in the module tree)."""
        if block not in self._sites:
            prefix = f"{self.block_prefix}.{block}"
            found = [
                *linear_sites(self.model, prefix, block, self._experts),
                *routed_sites(prefix, block, self._experts),
            ]
            self._sites[block] = tuple(sorted(found, key=lambda site: STAGES.index(site.stage)))
        return self._sites[block]

    def all_sites(self) -> tuple[Site, ...]:
        """Sites of every block."""
        return tuple(site for block in range(len(self.blocks)) for site in self.sites(block))

    def kept(self) -> tuple[Fallback, ...]:
        """Matrices of the blocks that stay in full precision though they are no routers, each with the reason."""
        kept = []
        for name, module in self.blocks.named_modules(prefix=self.block_prefix):
            if isinstance(module, nn.Linear):
                if not is_router(name, module) and (reason := kept_reason(name, module)):
                    kept.append(Fallback(name, "kept in full precision", reason))
            elif not is_experts_module(module) and not isinstance(module, CONVOLUTIONS):
                matrices = [leaf for leaf, p in module.named_parameters(recurse=False) if p.ndim > 1]
                kept += [
                    Fallback(
                        f"{name}.{leaf}", "kept in full precision", "a parameter that its module multiplies itself"
                    )
                    for leaf in matrices
                    if not is_router_part(name)
                ]
        return tuple(kept)

    def dtype_of(self, site: Site) -> torch.dtype:
        """The dtype in which the model holds the weights of a site."""
        return self._parameter(site).dtype

    def device_of(self, site: Site) -> torch.device:
        """Where the weights of a site are."""
        return self._parameter(site).device

    def get_weight(self, site: Site, experts: Sequence[int] | None = None) -> Tensor:
        """Weights of a site, [E, O, I], in the model's dtype (a copy).

        Args:
            site: Of any block.
            experts: Indices of the routed experts to read, in this order; None reads all.
        """
        if site.kind == "routed":
            weight_EOI = stacked_weight(*self._routed(site), experts).detach()
            if experts is None:
                return weight_EOI.clone(memory_format=torch.contiguous_format)
            return weight_EOI.contiguous()  # a copy already
        return torch.cat([self._linear(path).weight.detach() for path in site.modules]).unsqueeze(0)

    @torch.no_grad()
    def set_weight(self, site: Site, weight_EOI: Tensor, experts: Sequence[int] | None = None) -> None:
        """Write weights of a site, [E, O, I], rounded to their storage dtype and moved to the model's device.

        Args:
            site: Of any block.
            weight_EOI: As ``get_weight`` gives them.
            experts: Indices of the routed experts to write; None writes all.
        """
        if site.kind == "routed":
            module, part = self._routed(site)
            name = f"{site.modules[0]}.{parameter_name(module, part)}"
            write_stacked(module, part, rounded_to_storage(self.model, name, weight_EOI), experts)
            return
        for path, rows in zip(site.modules, weight_EOI[0].split(site.rows), strict=True):
            self._linear(path).weight.copy_(rounded_to_storage(self.model, f"{path}.weight", rows))

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the source's files: that of scales, and of everything that is written into the model."""
        return storage_dtype(self.model)

    def parameters_of(self, site: Site, weight_EOI: Tensor) -> dict[str, Tensor]:
        """The model's parameters, by name, if a site had these weights; differentiable, and nothing is written."""
        if site.kind == "routed":
            module, part = self._routed(site)
            return {f"{site.modules[0]}.{parameter_name(module, part)}": as_stored(module, part, weight_EOI)}
        rows = weight_EOI[0].split(site.rows)
        return {f"{path}.weight": weight_OI for path, weight_OI in zip(site.modules, rows, strict=True)}

    def routers(self, block: int) -> dict[str, nn.Module]:
        """The routers of a block by name: modules that multiply their input by ``weight``, one row per routed expert.

        Empty where a block has no routed experts, or a router of another form (say, of several layers).
        """
        prefix, found = f"{self.block_prefix}.{block}", {}
        sizes = {site.num_experts for site in self.sites(block) if site.kind == "routed"}
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) in sizes and is_router_part(name):
                found[name] = module
        return found

    def shared_affinity_gate(self, site: Site) -> nn.Module | None:
        """The linear whose sigmoid multiplies the output of the shared expert of a site, where the family has one."""
        if site.kind != "shared":
            return None
        return shared_gate(self.model.get_submodule(self._sparse_block(site.modules[0])))

    def shared_expert(self, site: Site) -> nn.Module:
        """The shared-expert module that a shared site belongs to (its input is the input of the sparse block)."""
        return self.model.get_submodule(site.modules[0].rpartition(".")[0])

    def observed_modules(self, sites: Sequence[Site]) -> tuple[list[nn.Module], list[nn.Module]]:
        """Modules with which a forward pass has shown the inputs of all these sites: once entered, once finished."""
        entered: list[nn.Module] = []
        finished: list[nn.Module] = []
        for site in sites:
            # The input of the experts' down projections arises inside their module.
            late = site.kind == "routed" and site.stage == "mlp_down"
            (finished if late else entered).extend(map(self.model.get_submodule, site.modules))
        return entered, finished

    def _sparse_block(self, path: str) -> str:
        return path.rpartition(".")[0].rpartition(".")[0]

    def _parameter(self, site: Site) -> Tensor:
        """One that holds weights of a site."""
        if site.kind == "routed":
            module, part = self._routed(site)
            return module.get_parameter(parameter_name(module, part))
        return self._linear(site.modules[0]).weight

    def _linear(self, path: str) -> nn.Linear:
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return module

    def _routed(self, site: Site) -> tuple[nn.Module, ExpertSide]:
        return self.model.get_submodule(site.modules[0]), "down" if site.stage == "mlp_down" else "into"
