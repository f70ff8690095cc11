"""What is solved together: the sites of a block, one input and the linears that it feeds.

Found from the module tree and the shapes of parameters alone; no weight is read.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeq.models.experts import ExpertSide, num_experts, projections, stacked_shape
from moeq.models.families import SHARED, linear_stage
from moeq.models.not_quantized import is_router, kept_reason
from moeq.quant.spec import WeightKind


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


def linear_sites(model: nn.Module, prefix: str, block: int, experts: Mapping[str, nn.Module]) -> Iterator[Site]:
    """Sites of the linears of a block that a table of families knows.

    Args:
        model: Holds the block.
        prefix: Path of the block.
        block: Its index.
        experts: Experts modules of the model by path: a linear beside one is part of a shared expert.
    """
    grouped: dict[tuple[str, str], list[tuple[str, nn.Linear]]] = defaultdict(list)
    sparse = {path.rpartition(".")[0] for path in experts}
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if not isinstance(module, nn.Linear) or is_router(name, module) or kept_reason(name, module):
            continue
        stage = linear_stage(name)
        assert stage is not None
        # Projections from the inner dimension each have an input of their own.
        own = name.rpartition(".")[0] if stage.endswith("_in") else name
        grouped[own, stage].append((name, module))
    for (_, stage), members in grouped.items():
        names, linears = [name for name, _ in members], [linear for _, linear in members]
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


def routed_sites(prefix: str, block: int, experts: Mapping[str, nn.Module]) -> Iterator[Site]:
    """Two sites, into and down, of every experts module below a path; arguments are those of ``linear_sites``."""
    for path, module in experts.items():
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
            _, rows, in_features = stacked_shape(module, part)
            yield Site(
                name=f"{path}.{'+'.join(leaves)}", stage=stage, leaves=leaves,
                rows=(rows // len(leaves),) * len(leaves), in_features=in_features, **common,
            )  # fmt: skip
