"""What learns in a block: latents of its quantized weights, and float32 masters of its norms, biases and routers.

Masters are in float32, everything else stays as it is stored: codes that do not learn are bytes.  Zero points do not
learn: on a uniform grid they are small integers, and to move one by a level is to move all codes of its group, which
the codes can do themselves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from moeq.fit.run import Run
from moeq.fit.schedule import whole
from moeq.fit.solve import make_units
from moeq.models.adapter import Adapter, Site
from moeq.models.storage import rounded_to_storage, storage_dtype
from moeq.quant.learned import NEAR_EDGE, Latent, close_latent, latent_weight, open_latent
from moeq.quant.spec import QuantizedWeight
from moeq.tuning.tuning_spec import TuningSpec


@dataclass(frozen=True)
class Leaf:
    """A float32 tensor that learns.

    Attributes:
        value: Its master.
        rate: Its step size at the height of the schedule.
        experts: Experts module and index of the expert that each row of it belongs to; None is every token's.
        bound: It stays within these.
    """

    value: Tensor
    rate: float
    experts: tuple[str, tuple[int, ...]] | None = None
    bound: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Stack:
    """Quantized weights of one leaf of the experts of a site that share a grid."""

    site: Site
    experts: tuple[int, ...]
    leaf: str
    rows: slice
    latent: Latent

    @property
    def names(self) -> list[str]:
        return [self.site.weight_name(expert, self.leaf) for expert in self.experts]

    @property
    def key(self) -> str:
        return f"{self.names[0]}, {len(self.experts)} experts"


class BlockLeaves:
    """Of one block, which is resident while it is opened and while its parameters are asked for.

    Args:
        adapter: The model; its own weights are read where they are not quantized.
        run: Its plan, and parameters that were changed.
        block: Which block.
        quantized: Weights of the block by canonical name.
        spec: Rates.

    Attributes:
        leaves: What learns, by key.
    """

    def __init__(
        self, adapter: Adapter, run: Run, block: int, quantized: Mapping[str, QuantizedWeight], spec: TuningSpec
    ) -> None:
        self.adapter, self.block, self._spec = adapter, block, spec
        self._prefix = f"{adapter.block_prefix}.{block}."
        self._stacks = list(_open(adapter, run, block, quantized, learn_levels=spec.level_rate > 0))
        self._layouts = {site: _Layout(site, stacks) for site, stacks in _by_site(self._stacks).items()}
        changed = {name: value for name, value in run.changed.items() if name.startswith(self._prefix)}
        device = next(adapter.blocks[block].parameters()).device
        self._fixed = {name: value.to(device) for name, value in changed.items()}
        self.leaves: dict[str, Leaf] = {}
        for stack in self._stacks:
            experts = (stack.site.modules[0], stack.experts) if stack.site.kind == "routed" else None
            if spec.scale_rate:
                self.leaves[f"{stack.key}: scale"] = Leaf(stack.latent.log_EOG, spec.scale_rate, experts)
            if spec.level_rate:
                bound = (-NEAR_EDGE, 2**stack.latent.bits - 1 + NEAR_EDGE)
                self.leaves[f"{stack.key}: level"] = Leaf(stack.latent.level_EOGS, spec.level_rate, experts, bound)
        self._others: dict[str, Leaf] = {}
        for name, rate in _others(adapter, block, spec):
            value = self._fixed.get(name, adapter.model.get_parameter(name)).detach()
            self._others[name] = Leaf(value.float().clone().requires_grad_(), rate)
        self.leaves |= self._others

    def parameters(self) -> dict[str, Tensor]:
        """Values of the block's parameters by their name in the block, in its dtype; differentiable in the leaves."""
        values = dict(self._fixed)
        for site, layout in self._layouts.items():
            values |= self.adapter.parameters_of(site, layout.weight(self.adapter))
        values |= {name: leaf.value for name, leaf in self._others.items()}
        return {name.removeprefix(self._prefix): self._as_stored(name, value) for name, value in values.items()}

    def close(self, quantized: Mapping[str, QuantizedWeight]) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Weights with what was learned, and the other parameters that learned, by name, on the CPU."""
        weights: dict[str, QuantizedWeight] = {}
        for stack in self._stacks:
            to_device = partial(torch.Tensor.to, device=stack.latent.log_EOG.device)
            before = [quantized[name].each(to_device) for name in stack.names]
            learned = close_latent(stack.latent, before)
            weights |= {name: weight.each(Tensor.cpu) for name, weight in zip(stack.names, learned, strict=True)}
        model = self.adapter.model
        others = {
            name: rounded_to_storage(model, name, leaf.value.detach()).cpu() for name, leaf in self._others.items()
        }
        return weights, others

    def _as_stored(self, name: str, value: Tensor) -> Tensor:
        """Rounded to what files hold, in the dtype of the model; gradients pass."""
        model = self.adapter.model
        return value.to(storage_dtype(model, name)).to(model.get_parameter(name).dtype)


class _Layout:
    """Where the rows of the stacks of a site are in its weight [E, O, I]."""

    def __init__(self, site: Site, stacks: Sequence[_Stack]) -> None:
        self.site, self.stacks = site, stacks
        rows_EO = torch.arange(site.num_experts * sum(site.rows)).view(site.num_experts, -1)
        taken = torch.cat([rows_EO[list(stack.experts), stack.rows].flatten() for stack in stacks])
        kept = torch.ones(rows_EO.numel(), dtype=torch.bool)
        kept[taken] = False
        device = stacks[0].latent.log_EOG.device
        self._kept = kept.nonzero().squeeze(1).to(device)
        self._order = torch.cat([taken.to(device), self._kept]).argsort()

    def weight(self, adapter: Adapter) -> Tensor:
        """The weight, float32; rows that are not quantized are the model's."""
        site = self.site
        latents = [replace(stack.latent, level_EOGS=stack.latent.level_EOGS.float()) for stack in self.stacks]
        rows = [latent_weight(latent).flatten(0, 1) for latent in latents]
        if len(self._kept):
            rows.append(adapter.get_weight(site).flatten(0, 1)[self._kept].float())
        return torch.cat(rows).index_select(0, self._order).view(site.num_experts, -1, site.in_features)


def _by_site(stacks: Sequence[_Stack]) -> dict[Site, list[_Stack]]:
    found: dict[Site, list[_Stack]] = {}
    for stack in stacks:
        found.setdefault(stack.site, []).append(stack)
    return found


def _open(
    adapter: Adapter, run: Run, block: int, quantized: Mapping[str, QuantizedWeight], *, learn_levels: bool
) -> Iterator[_Stack]:
    sites = adapter.sites(block)
    device = next(adapter.blocks[block].parameters()).device
    for unit in make_units([whole(site) for site in sites], run.plan, max(site.num_experts for site in sites)):
        ends = torch.tensor(unit.site.rows).cumsum(0).tolist()
        for index in unit.leaves:
            leaf, rows = unit.site.leaves[index], slice(ends[index] - unit.site.rows[index], ends[index])
            weights = [quantized[unit.site.weight_name(expert, leaf)] for expert in unit.experts]
            shape = (len(weights), *weights[0].codes_OI.shape)
            # Levels begin in the middle of their cells.
            latent = open_latent(weights, torch.zeros(shape, dtype=torch.float16, device=device))
            if not learn_levels:
                latent = replace(latent, level_EOGS=latent.level_EOGS.detach().to(torch.uint8))
            yield _Stack(unit.site, unit.experts, leaf, rows, latent)


def _others(adapter: Adapter, block: int, spec: TuningSpec) -> Iterator[tuple[str, float]]:
    """Names of the parameters of a block that are not quantized and learn, with their rates."""
    prefix = f"{adapter.block_prefix}.{block}"
    routers = {f"{name}.weight" for name in adapter.routers(block)}
    for name, parameter in adapter.blocks[block].named_parameters(prefix=prefix):
        if name in routers and spec.router_rate:
            yield name, spec.router_rate
        elif parameter.ndim == 1 and spec.norm_rate:
            yield name, spec.norm_rate
