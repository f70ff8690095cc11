"""The passes of a run: one sweep of the calibration batches through one block is one epoch.

A survey of every block comes first where a step asked for one.  Then each block has its calibration passes, in the
order of the data flow, so that each linear sees inputs made by already quantized ones (design: one pass per stage).
Then the batches advance through the finished block to the next one.

Steps that compare with the original model ask for a pass of the original block on the original hidden states before
any weight of the block changes; a router that is refitted has a pass of its own before the experts are calibrated.  A
resumed run only advances through its finished blocks, whose weights are written into the model then.

Memory.  The Hessians of a pass never exceed a bound: sites that would need more are cut into *parts*, ranges of their
experts, and the data are swept once for each chunk of parts.  Weights are written into the model after the last chunk,
so every chunk sees the same inputs, and the codes do not depend on the bound.  In bytes, with I in features, E experts
of a part and the pooled Hessian of the whole site where it has several experts:

    part = 8 I^2 (E + 1) float64 sums + 4 I^2 E float32 working copies

Under routing "all_experts" gate and up of all experts have one input, and so one sum: 8 I^2 + 4 I^2 E.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moeq.models.adapter import STAGES, Site
from moeq.quant.spec import Routing

Sequential = Literal["stage", "block"]
PassKind = Literal["survey", "original", "router", "calibrate", "advance"]
GIB = 1 << 30


@dataclass(frozen=True)
class SitePart:
    """Experts of a site whose Hessians one pass gathers: all of them, or a range of consecutive ones.

    Attributes:
        site: The site.
        experts: The range.
        shared: Whether all experts of the site have one Hessian.
    """

    site: Site
    experts: range
    shared: bool = False

    @property
    def pooled(self) -> bool:
        """Whether the site has experts to pool a Hessian over."""
        return self.site.num_experts > 1 and not self.shared

    @property
    def is_last(self) -> bool:
        """Whether the last expert of the site is among them."""
        return self.experts.stop == self.site.num_experts

    @property
    def num_sums(self) -> int:
        """Hessians that are summed up for the experts."""
        return 1 if self.shared else len(self.experts)

    @property
    def opens_pool(self) -> bool:
        """Whether the pass that gathers this part also gathers the pool."""
        return self.pooled and self.experts.start == 0

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums: float64, one matrix for each and one for the pool."""
        return 8 * self.site.in_features**2 * (self.num_sums + self.pooled)

    @property
    def working_bytes(self) -> int:
        """Bytes of the copies that are solved with: float32, one matrix per expert."""
        return 4 * self.site.in_features**2 * len(self.experts)

    @property
    def bytes(self) -> int:
        """What the bound counts."""
        return self.sum_bytes + self.working_bytes


def whole(site: Site) -> SitePart:
    """All experts of a site."""
    return _part(site, 0, site.num_experts, "routed")


def _part(site: Site, start: int, count: int, routing: Routing) -> SitePart:
    shared = routing == "all_experts" and site.kind == "routed" and site.stage == "mlp_in"
    return SitePart(site, range(start, min(start + count, site.num_experts)), shared)


@dataclass(frozen=True)
class Pass:
    """One epoch: what is swept, which Hessians are gathered in it, and which weights are quantized after it.

    Attributes:
        kind: A survey gathers and quantizes nothing of its own; "original" runs the block before any of its weights
            changes, on the original hidden states; "router" ends at the router; "advance" runs the finished block.
        block: Index of the block.
        sites: Sites that are quantized when the pass is over; none where further chunks of them follow.
        ends_block: Whether the block is finished then.
        parts: Experts whose Hessians are gathered; all experts of ``sites`` where nothing had to be cut.
        chunk: Position and number of the passes that share the sites.
    """

    kind: PassKind
    block: int
    sites: tuple[Site, ...]
    ends_block: bool
    parts: tuple[SitePart, ...] = ()
    chunk: tuple[int, int] = (1, 1)

    @property
    def observed(self) -> tuple[Site, ...]:
        """Sites whose inputs the pass has to reach."""
        return tuple(dict.fromkeys([*self.sites, *(part.site for part in self.parts)]))

    @property
    def label(self) -> str:
        """Short description for progress bars and logs."""
        stages = dict.fromkeys(site.stage for site in self.observed)
        position = "" if self.chunk[1] == 1 else f" ({self.chunk[0]} of {self.chunk[1]})"
        return f"block {self.block} {'+'.join(stages) if self.kind == 'calibrate' else self.kind}{position}"


def build_schedule(
    sites_by_block: Sequence[tuple[Site, ...]],
    *,
    survey: bool,
    sequential: Sequential,
    first_block: int = 0,
    hessian_gib: float = math.inf,
    originals: bool = False,
    routers: bool = False,
    routing: Routing = "routed",
) -> tuple[Pass, ...]:
    """Passes of a run over all blocks.

    Args:
        sites_by_block: Sites of every block.
        survey: Sweep every block of the original model first.
        sequential: "stage": one pass per stage of a block; "block": one pass per block (faster, less exact).
        first_block: Blocks before it are finished (a resumed run).
        hessian_gib: Bound on the Hessians of a pass, in GiB.
        originals: Run every block on the original hidden states before its weights change.
        routers: Give the router of every block a pass before its experts.
        routing: Which tokens the Hessians of routed experts are made of.

    Raises:
        ValueError: The Hessian of a single expert exceeds the bound, or routers have no place in the order.
    """
    if routers and sequential == "block":
        raise ValueError(
            'sequential ("block") calibrates the experts of a block together with what comes before its router, so a '
            "router cannot be refitted between them; set --model.sequential stage, or leave out the step"
        )
    blocks = range(len(sites_by_block))
    if first_block == len(blocks):
        return ()
    passes = [Pass("survey", block, (), ends_block=False) for block in blocks] if survey else []
    for block, sites in enumerate(sites_by_block):
        if originals:
            passes.append(Pass("original", block, (), ends_block=False))
        if block < first_block:
            passes.append(Pass("advance", block, (), ends_block=False))
            continue
        groups = [sites]
        if sequential == "stage":
            groups = [group for stage in STAGES if (group := tuple(site for site in sites if site.stage == stage))]
        for group in groups:
            if routers and any(site.kind == "routed" and site.stage == "mlp_in" for site in group):
                passes.append(Pass("router", block, (), ends_block=False))
            passes += _calibration_passes(block, group, group is groups[-1], list(cut(group, hessian_gib, routing)))
        if block != blocks[-1]:
            passes.append(Pass("advance", block, (), ends_block=False))
    return tuple(passes)


def _calibration_passes(
    block: int, sites: tuple[Site, ...], ends_block: bool, chunks: Sequence[tuple[SitePart, ...]]
) -> list[Pass]:
    """One pass for each chunk of the sites; the last one quantizes them."""
    open_passes = [
        Pass("calibrate", block, (), False, parts, (position, len(chunks)))
        for position, parts in enumerate(chunks[:-1], 1)
    ]
    return [*open_passes, Pass("calibrate", block, sites, ends_block, chunks[-1], (len(chunks), len(chunks)))]


def cut(sites: Sequence[Site], hessian_gib: float, routing: Routing) -> Iterator[tuple[SitePart, ...]]:
    """Parts of the sites, in their order, in chunks that each stay within the bound.

    Args:
        sites: What is calibrated on the same state of the model.
        hessian_gib: The bound, in GiB.
        routing: Which tokens the Hessians of routed experts are made of.

    Raises:
        ValueError: The Hessian of a single expert exceeds the bound.
    """
    chunk: list[SitePart] = []
    for site in sites:
        start = 0
        while start < site.num_experts:
            room = hessian_gib * GIB - sum(part.bytes for part in chunk)
            if fit := _num_that_fit(site, room, routing):
                chunk.append(_part(site, start, fit, routing))
                start = chunk[-1].experts.stop
            elif chunk:
                yield tuple(chunk)
                chunk = []
            else:
                need = _part(site, 0, 1, routing).bytes / GIB
                raise ValueError(
                    f"hessian_gib ({hessian_gib:g}) must hold one Hessian of {site.name}, which needs {need:.3g} GiB "
                    f"({site.in_features} in features); set --model.hessian_gib {math.ceil(100 * need) / 100:g} or more"
                )
    yield tuple(chunk)


def _num_that_fit(site: Site, room: float, routing: Routing) -> int:
    """How many experts of a site have Hessians of at most ``room`` bytes together."""
    return next((n for n in range(site.num_experts, 0, -1) if _part(site, 0, n, routing).bytes <= room), 0)
