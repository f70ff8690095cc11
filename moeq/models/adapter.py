"""Where the quantizable weights of a Mixture-of-Experts model are, and which inputs feed them.

The algorithms see a model as a sequence of blocks, and a block as a tuple of *sites*.  A site is one input that feeds
one or more linears: they share a Hessian and are solved stacked along the out-features.  The weights of every site
have the shape [E, O, I]: E experts for a routed site, E = 1 for every other linear.

Routed experts are found by the experts interface of transformers v5 (``has_gate``, ``is_transposed``), never by the
name of the family.  What families call their routers and gates stands in ``families.py``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeq.models.families import is_router, linear_stage, shared_gate

Kind = Literal["attention", "dense", "shared", "routed"]
STAGES = ("attention_in", "attention_mid", "attention_out", "mlp_in", "mlp_down")


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
    kind: Kind
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


def is_experts_module(module: nn.Module) -> bool:
    """True for a module that follows the experts interface of transformers v5 (routed experts as one module)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


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
        ValueError: The model has no routed experts, or experts in a layout that cannot be expressed per expert.
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
        for path, module in experts.items():
            _check_layout(family, path, module)

    def expert_modules(self) -> dict[str, nn.Module]:
        """Every experts module by path, in block order."""
        return {name: module for name, module in self.model.named_modules() if is_experts_module(module)}

    def sites(self, block: int) -> tuple[Site, ...]:
        """Sites of one block in the order of its data flow (stages, then position in the module tree)."""
        prefix = f"{self.block_prefix}.{block}"
        found = [*self._linear_sites(prefix, block), *self._routed_sites(prefix, block)]
        return tuple(sorted(found, key=lambda site: STAGES.index(site.stage)))

    def all_sites(self) -> tuple[Site, ...]:
        """Sites of every block."""
        return tuple(site for block in range(len(self.blocks)) for site in self.sites(block))

    def get_weight(self, site: Site) -> Tensor:
        """Weights of a site, [E, O, I], in the model's dtype (a copy)."""
        if site.kind == "routed":
            return self._routed_parameter(site).detach().clone()
        return torch.cat([self._linear(path).weight.detach() for path in site.modules]).unsqueeze(0)

    @torch.no_grad()
    def set_weight(self, site: Site, weight_EOI: Tensor) -> None:
        """Write weights of a site, [E, O, I]; they are cast to the model's dtype and moved to its device."""
        if site.kind == "routed":
            self._routed_parameter(site).copy_(weight_EOI)
            return
        for path, rows in zip(site.modules, weight_EOI[0].split(site.rows), strict=True):
            self._linear(path).weight.copy_(rows)

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

    def _routed_parameter(self, site: Site) -> Tensor:
        module = self.model.get_submodule(site.modules[0])
        parameter = getattr(module, "down_proj" if site.stage == "mlp_down" else "gate_up_proj")
        assert isinstance(parameter, Tensor)
        return parameter

    def _linear_sites(self, prefix: str, block: int) -> Iterator[Site]:
        grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
        sparse = {path.rpartition(".")[0] for path in self.expert_modules()}
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            if not isinstance(module, nn.Linear) or is_router(name, module):
                continue
            parent, _, leaf = name.rpartition(".")
            stage = linear_stage(leaf)
            # Projections from the inner dimension each have an input of their own.
            own = parent if stage.endswith("_in") else name
            grouped[own, stage].append(name)
        for (_, stage), names in grouped.items():
            linears = [self._linear(name) for name in names]
            parent = names[0].rpartition(".")[0]
            kind: Kind = "attention" if stage.startswith("attention") else "dense"
            if kind == "dense" and parent.rpartition(".")[0] in sparse:
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
            into, down = module.gate_up_proj, module.down_proj
            assert isinstance(into, Tensor)
            assert isinstance(down, Tensor)
            num_experts, rows, in_features = into.shape
            leaves = ("gate_proj", "up_proj")
            common: dict[str, Any] = {"block": block, "kind": "routed", "modules": (path,), "num_experts": num_experts}
            yield Site(
                name=f"{path}.{'+'.join(leaves)}", stage="mlp_in", leaves=leaves,
                rows=(rows // len(leaves),) * len(leaves), in_features=in_features, **common,
            )  # fmt: skip
            yield Site(
                name=f"{path}.down_proj", stage="mlp_down", leaves=("down_proj",),
                rows=(down.shape[1],), in_features=down.shape[2], **common,
            )  # fmt: skip


def _check_layout(family: str, path: str, module: nn.Module) -> None:
    problems = [
        ("transposed expert weights", bool(module.is_transposed)),
        ("biases in its experts", bool(getattr(module, "has_bias", False))),
        ("no gate projection", not module.has_gate),
        ("a norm after each expert", bool(getattr(module, "has_post_expert_norm", False))),
        ("interleaved gate and up rows", not getattr(module, "is_concatenated", True)),
        ("packed weights: it is a quantized export already", not hasattr(module, "down_proj")),
    ]
    for problem, present in problems:
        if present:
            raise ValueError(
                f"{family} cannot be quantized by moeq: {path} has {problem}, which the per-expert checkpoint does not "
                "express; use a family with plain experts (qwen2_moe, qwen3_moe, mixtral, deepseek_v3, olmoe)"
            )
