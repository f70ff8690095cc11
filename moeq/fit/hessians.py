"""Hessians of a pass: summed while batches run, over ranks when they are first read, and as a solver takes them.

The sums reduce themselves, so that no order of steps can read the partial sums of one rank.  Every rank must read
them, or end the pass, at the same point of the run, as it is a collective operation.

Shapes: E experts, I in features, T tokens of one expert.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from moeq.distributed import sum_over_ranks
from moeq.fit.schedule import SitePart
from moeq.models.adapter import Adapter, Site
from moeq.models.observe import TokenMask, observe
from moeq.quant.coverage import CoverageSpec, find_uncovered, hessians_to_solve, shared_by
from moeq.quant.hessian import HessianState, accumulate, empty_state
from moeq.quant.hessian_groups import accumulate_groups
from moeq.quant.spec import Fallback, Routing
from moeq.quant.together import taken_together

# Mean Hessians, float32 [E, I, I], of some experts of a site.
HessiansOf = Callable[[Site, Sequence[int]], Tensor]


class Hessians:
    """Sums of the parts of the current pass, and those over all experts of their sites (pools), kept between chunks."""

    def __init__(self) -> None:
        self._parts: dict[str, SitePart] = {}
        self._sums: dict[str, HessianState] = {}
        self._pools: dict[str, HessianState] = {}
        self._reduced = False
        self._device = torch.device("cpu")

    def open(self, parts: Sequence[SitePart], device: torch.device | str) -> None:
        """Start a pass: sums over no token for its parts, and for the pool of each site that is new."""
        self._parts, self._reduced = {part.site.name: part for part in parts}, False
        self._device = torch.device(device)
        for name, part in self._parts.items():
            self._sums[name] = empty_state(part.num_sums, part.site.in_features, device)
            if part.opens_pool:
                self._pools[name] = empty_state(1, part.site.in_features, device)

    def gathered(
        self, adapter: Adapter, power: float, routing: Routing, mask: TokenMask | None = None
    ) -> AbstractContextManager[TokenMask]:
        """Within, forward passes add the inputs of the pass's parts: on a CPU one expert after another."""
        add = partial(self.add, power=power)
        add_groups = partial(self.add_groups, power=power) if taken_together(self._device) else None
        return observe(adapter, tuple(part.site for part in self._parts.values()), add, routing, mask, add_groups)

    def add(self, site: Site, expert: int, x_TI: Tensor, affinity_T: Tensor | None, power: float) -> None:
        """Add the inputs of one expert; those of experts of no part count for the pool alone.

        Raises:
            ValueError: The sums have been read already: what comes later would be missing in what was solved.
        """
        part, sums, pool = self._open_sums(site)
        if part.shared:
            accumulate(sums, 0, x_TI, affinity_T, power)
        elif expert in part.experts:
            accumulate(sums, expert - part.experts.start, x_TI, affinity_T, power, pool)
        elif pool is not None:
            accumulate(pool, 0, x_TI, affinity_T, power)

    def add_groups(self, site: Site, x_NI: Tensor, affinity_N: Tensor, starts: list[int], power: float) -> None:
        """Add the inputs of all experts of a site, sorted by expert; the same sums as ``add`` makes one by one.

        Raises:
            ValueError: The sums have been read already.
        """
        part, sums, pool = self._open_sums(site)
        own = slice(starts[part.experts.start], starts[part.experts.stop])
        local = [start - own.start for start in starts[part.experts.start : part.experts.stop + 1]]
        accumulate_groups(sums, x_NI[own], affinity_N[own], local, power, pool)
        for others in (slice(0, own.start), slice(own.stop, len(x_NI))):
            if pool is not None and others.stop > others.start:
                accumulate(pool, 0, x_NI[others], affinity_N[others], power)

    def _open_sums(self, site: Site) -> tuple[SitePart, HessianState, HessianState | None]:
        """The part of a site, its sums, and its pool where this pass gathers it."""
        if self._reduced:
            raise ValueError(f"the Hessian of {site.name} was read before its pass was over; read it at its end")
        part = self._parts[site.name]
        return part, self._sums[site.name], self._pools[site.name] if part.opens_pool else None

    def close(self) -> None:
        """End a pass: its sums are dropped, pools after the last part of their site."""
        if any(part.opens_pool and not part.is_last for part in self._parts.values()):
            self._reduce()  # a later pass reads the pool
        for name, part in self._parts.items():
            if part.is_last:
                self._pools.pop(name, None)
        self._parts.clear()
        self._sums.clear()

    def __contains__(self, site: Site) -> bool:
        """Whether the current pass gathers Hessians of a site."""
        return site.name in self._sums

    def __getitem__(self, site: Site) -> HessianState:
        """Sums over all tokens of all ranks, of the experts of the pass's part of a site."""
        self._reduce()
        return self._sums[site.name]

    def pool(self, site: Site) -> HessianState | None:
        """Sums over all experts of a site (E = 1); None where it has no more than one, or all share a Hessian."""
        self._reduce()
        return self._pools.get(site.name)

    def _reduce(self) -> None:
        """Add up the ranks, site by site in the order of the pass."""
        if self._reduced:
            return
        self._reduced = True
        for name, part in self._parts.items():
            sum_over_ranks(self._sums[name].tensors())
            if part.opens_pool:
                sum_over_ranks(self._pools[name].tensors())
            if part.shared:
                self._sums[name] = shared_by(self._sums[name], len(part.experts))


def hessians_of(
    hessians: Hessians, parts: Sequence[SitePart], coverage: CoverageSpec
) -> tuple[HessiansOf, list[Fallback]]:
    """Hessians as a solver takes them, and a record of every expert that the data hardly reached.

    Args:
        hessians: Of the current pass; read here, so all ranks must call it.
        parts: Which of them.
        coverage: What an expert with few tokens gets.

    Raises:
        ValueError: See ``moeq.quant.coverage.find_uncovered``.
    """
    uncovered: dict[str, Tensor] = {}
    fallbacks: list[Fallback] = []
    for part in parts:
        site = part.site
        # Stacked linears share a Hessian: the first stands for all of them in the report.
        names = [site.weight_name(expert, site.leaves[0]) for expert in part.experts]
        uncovered[site.name], found = find_uncovered(hessians[site], coverage, names, hessians.pool(site))
        fallbacks += found
    first = {part.site.name: part.experts.start for part in parts}

    def of(site: Site, experts: Sequence[int]) -> Tensor:
        positions = [expert - first[site.name] for expert in experts]
        return hessians_to_solve(hessians[site], coverage, positions, uncovered[site.name], hessians.pool(site))

    return of, fallbacks
