"""Where the quantizable weights of a Mixture-of-Experts model are, and which inputs feed them.

The algorithms see a model as a sequence of blocks, and a block as a tuple of *sites*.  A site is one input that feeds
one or more linears: they share a Hessian and are solved stacked along the out-features.  The weights of every site
have the shape [E, O, I]: E experts for a routed site, E = 1 for every other linear.

Routed experts are found by the experts interface of transformers v5 (``has_gate``, ``is_transposed``), never by the
name of the family; how they are stored is known to ``experts.py`` alone.  What families call their routers, gates and
linears stands in ``families.py``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeq.models.experts import (
    ExpertSide,
    as_stored,
    expert_modules,
    is_experts_module,
    layout_problem,
    num_experts,
    parameter_name,
    projections,
    stacked_weight,
    write_stacked,
)
from moeq.models.families import (
    SHARED,
    STAGES,
    is_router,
    is_router_part,
    kept_reason,
    linear_stage,
    refusal,
    shared_gate,
)
from moeq.models.storage import rounded_to_storage, storage_dtype
from moeq.quant.spec import Fallback, WeightKind

__all__ = ["STAGES", "Adapter", "Site", "WeightKind", "find_blocks", "is_experts_module"]


@dataclass(frozen=True)
class Site:
    """One input of a block and the weights it feeds.

    Attributes:
        name: Unique name: the path of the first weight, the experts module standing for all its experts.
        block: Index of the block.
        kind: Which structure of the block it belongs to.
        stage: One of ``STAGES``: where in the block's data flow its input arises.
        modules: Paths of the linears that receive the input, or of the one experts module.
        leaves: Names of the stacked linears in stacking order, e.g. ("gate_proj", "up_proj").
        rows: Out-features of each leaf.
        in_features: Width of the input.
        num_experts: E; 1 for a site that is not routed.
    """

    name: str
    block: int
    kind: WeightKind
    stage: str
    modules: tuple[str, ...]
    leaves: tuple[str, ...]
    rows: tuple[int, ...]
    in_features: int
    num_experts: int

    def weight_name(self, expert: int, leaf: str) -> str:
        """Canonical name of one weight: module path, the expert index inserted for routed experts."""
        if self.kind == "routed":
            return f"{self.modules[0]}.{expert}.{leaf}"
        return self.modules[self.leaves.index(leaf)]

    def weight_names(self) -> list[str]:
        """Canonical names of all weights of the site, expert by expert."""
        return [self.weight_name(e, leaf) for e in range(self.num_experts) for leaf in self.leaves]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks; raises ValueError where the model has none."""
    for name, module in model.named_modules():
        if isinstance(layers := getattr(module, "layers", None), nn.ModuleList):
            return (f"{name}.layers" if name else "layers"), layers
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks named 'layers'; give a causal LM")


class Adapter:
    """Answers where things are in one model.

    Args:
        model: A causal LM of transformers v5.

    Raises:
        ValueError: The model has no routed experts, experts that cannot be taken apart, or blocks that cannot be run
            one at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.block_prefix, self.blocks = find_blocks(model)
        experts = self.expert_modules()
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if not experts:
            raise ValueError(
                f"{family} has no routed experts, or experts that do not follow the transformers experts interface; "
                "moeq quantizes Mixture-of-Experts models such as qwen2_moe, qwen3_moe, mixtral, deepseek_v3 or olmoe"
            )
        problems = [f"{path} {why}" for path, module in experts.items() if (why := layout_problem(module))]
        problems += [why] if (why := refusal(getattr(model, "config", None))) else []
        if problems:
            raise ValueError(
                f"{family} cannot be quantized by moeq: {problems[0]}; docs/families.md lists the families that can"
            )

    def expert_modules(self) -> dict[str, nn.Module]:
        """Every experts module by path, in block order."""
        return expert_modules(self.model)

    def sites(self, block: int) -> tuple[Site, ...]:
        """Sites of one block in the order of its data flow (stages, then position in the module tree)."""
        prefix = f"{self.block_prefix}.{block}"
        found = [*self._linear_sites(prefix, block), *self._routed_sites(prefix, block)]
        return tuple(sorted(found, key=lambda site: STAGES.index(site.stage)))

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
            elif not is_experts_module(module) and not isinstance(module, nn.modules.conv._ConvNd):
                matrices = [leaf for leaf, p in module.named_parameters(recurse=False) if p.ndim > 1]
                kept += [
                    Fallback(
                        f"{name}.{leaf}", "kept in full precision", "a parameter that its module multiplies itself"
                    )
                    for leaf in matrices
                    if not is_router_part(name)
                ]
        return tuple(kept)

    def get_weight(self, site: Site) -> Tensor:
        """Weights of a site, [E, O, I], in the dtype that the model computes in (a copy)."""
        if site.kind == "routed":
            return stacked_weight(*self._routed(site)).detach().clone(memory_format=torch.contiguous_format)
        return torch.cat([self._linear(path).weight.detach() for path in site.modules]).unsqueeze(0)

    @torch.no_grad()
    def set_weight(self, site: Site, weight_EOI: Tensor) -> None:
        """Write weights of a site, [E, O, I], rounded to their storage dtype and moved to the model's device."""
        if site.kind == "routed":
            module, part = self._routed(site)
            name = f"{site.modules[0]}.{parameter_name(module, part)}"
            write_stacked(module, part, rounded_to_storage(self.model, name, weight_EOI))
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

    def _linear(self, path: str) -> nn.Linear:
        module = self.model.get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return module

    def _routed(self, site: Site) -> tuple[nn.Module, ExpertSide]:
        return self.model.get_submodule(site.modules[0]), "down" if site.stage == "mlp_down" else "into"

    def _linear_sites(self, prefix: str, block: int) -> Iterator[Site]:
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        sparse = {path.rpartition(".")[0] for path in self.expert_modules()}
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            if not isinstance(module, nn.Linear) or is_router(name, module) or kept_reason(name, module):
                continue
            stage = linear_stage(name)
            assert stage is not None
            # Projections from the inner dimension each have an input of their own.
            own = name.rpartition(".")[0] if stage.endswith("_in") else name
            grouped[own, stage].append(name)
        for (_, stage), names in grouped.items():
            linears = [self._linear(name) for name in names]
            parent = names[0].rpartition(".")[0]
            kind: WeightKind = "attention" if stage.startswith("attention") else "dense"
            inside = stage in ("mlp_in", "mlp_down")
            if inside and (parent.rpartition(".")[0] in sparse or not SHARED.isdisjoint(parent.split("."))):
                kind = "shared"
            yield Site(
                name=names[0], block=block, kind=kind, stage=stage, modules=tuple(names),
                leaves=tuple(name.rpartition(".")[2] for name in names),
                rows=tuple(linear.out_features for linear in linears),
                in_features=linears[0].in_features, num_experts=1,
            )  # fmt: skip

    def _routed_sites(self, prefix: str, block: int) -> Iterator[Site]:
        for path, module in self.expert_modules().items():
            if not path.startswith(f"{prefix}."):
                continue
            common: dict[str, Any] = {
                "block": block, "kind": "routed", "modules": (path,), "num_experts": num_experts(module),
            }  # fmt: skip
            *into, down = projections(module)
            parts: tuple[tuple[ExpertSide, str, tuple[str, ...]], ...] = (
                ("into", "mlp_in", tuple(into)), ("down", "mlp_down", (down,)),
            )  # fmt: skip
            for part, stage, leaves in parts:
                _, rows, in_features = stacked_weight(module, part).shape
                yield Site(
                    name=f"{path}.{'+'.join(leaves)}", stage=stage, leaves=leaves,
                    rows=(rows // len(leaves),) * len(leaves), in_features=in_features, **common,
                )  # fmt: skip
