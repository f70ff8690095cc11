"""Solved weights at every choice, kept by a survey: any plan of a model is then put together without another solve.

A survey solves every weight at every choice, on the inputs of the original model, to know what it costs.  What it found
waits here, so that a plan is a look-up.  A fit solves its plan again, on inputs that are quantized already.

Shapes: E experts, O out features of a site (its linears stacked), I in features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.disk.waiting import WaitingStates
from moeq.distributed import broadcast, rank_and_world
from moeq.models.adapter import Adapter, Site
from moeq.quant.spec import GridSpec

Plan = Mapping[str, GridSpec]


class Candidates:
    """Weights by name and choice, in the dtype in which they are stored.

    Args:
        adapter: The model, which keeps its original weights.
        waiting: Where they wait, in memory up to its bound, then on the disk; one that nobody else clears.
    """

    def __init__(self, adapter: Adapter, waiting: WaitingStates) -> None:
        self.adapter, self._waiting = adapter, waiting

    def keep(self, site: Site, choice: Choice, weight_EOI: Tensor) -> None:
        """Keep a solved site."""
        weight_EOI = weight_EOI.to(self.adapter.storage_dtype)
        for expert, stack_OI in enumerate(weight_EOI):
            for leaf, weight_OI in zip(site.leaves, stack_OI.split(site.rows), strict=True):
                # A copy: a part that waits would keep the whole stack.
                self._waiting.put((site.weight_name(expert, leaf), choice), weight_OI.clone())

    def share(self, sites: Sequence[Site], choices: Mapping[Site, Sequence[Choice]]) -> None:
        """Give every rank what the others have solved: site i was solved by rank i modulo their number."""
        rank, world = rank_and_world()
        for index, site in enumerate(sites if world > 1 else ()):
            rows = dict(zip(site.leaves, site.rows, strict=True))
            for expert, leaf in ((expert, leaf) for expert in range(site.num_experts) for leaf in site.leaves):
                name = site.weight_name(expert, leaf)
                for choice in choices[site]:
                    weight_OI = torch.empty(rows[leaf], site.in_features, dtype=self.adapter.storage_dtype)
                    if index % world == rank:
                        weight_OI = self.read(name, choice).clone()
                    broadcast(weight_OI, index % world)
                    self._waiting.put((name, choice), weight_OI)

    def read(self, name: str, choice: Choice) -> Tensor:
        """A weight at a choice, [O, I], on the CPU; it must not be changed."""
        return self._waiting.read((name, choice))

    @contextmanager
    def in_place(self, block: int, plan: Plan) -> Iterator[None]:
        """Within, a resident block has the weights of a plan; those that the plan lacks stay as they are."""
        originals = {site: self.adapter.get_weight(site) for site in self.adapter.sites(block)}
        try:
            for site, weight_EOI in originals.items():
                self.adapter.set_weight(site, self._stack(site, plan, weight_EOI))
            yield
        finally:
            for site, weight_EOI in originals.items():
                self.adapter.set_weight(site, weight_EOI)

    def _stack(self, site: Site, plan: Plan, original_EOI: Tensor) -> Tensor:
        stack_EOI, start = original_EOI.clone(), 0
        for leaf, rows in zip(site.leaves, site.rows, strict=True):
            for expert in range(site.num_experts):
                name = site.weight_name(expert, leaf)
                if name in plan:
                    stack_EOI[expert, start : start + rows] = self.read(name, Choice.of(plan[name]))
            start += rows
        return stack_EOI
