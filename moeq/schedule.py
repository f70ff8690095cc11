"""The passes of a run: one sweep of the calibration batches through one block is one epoch.

A survey of every block comes first where a step asked for one.  Then each block has its calibration passes, in the
order of the data flow, so that each linear sees inputs made by already quantized ones (design: one pass per stage).

Memory.  The Hessians of a pass never exceed a bound: sites that would need more are cut into *parts*, ranges of their
experts, and the data are swept once for each chunk of parts.  Weights are written into the model after the last chunk,
so every chunk sees the same inputs, and the codes do not depend on the bound.  In bytes, with I in features, E experts
of a part and the pooled Hessian of the whole site where it has several experts:

    part = 8 I^2 (E + 1) float64 sums + 4 I^2 E float32 working copies
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moeq.models.adapter import STAGES, Site

Sequential = Literal["stage", "block"]
GIB = 1 << 30


@dataclass(frozen=True)
class Part:
    """Experts of a site whose Hessians one pass gathers: all of them, or a range of consecutive ones."""

    site: Site
    experts: range

    @property
    def pooled(self) -> bool:
        """Whether the site has experts to pool a Hessian over."""
        return self.site.num_experts > 1

    @property
    def opens_pool(self) -> bool:
        """Whether the pass that gathers this part also gathers the pool."""
        return self.pooled and self.experts.start == 0

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums: float64, one matrix per expert and the pool."""
        return 8 * self.site.in_features**2 * (len(self.experts) + self.pooled)

    @property
    def working_bytes(self) -> int:
        """Bytes of the copies that are solved with: float32, one matrix per expert."""
        return 4 * self.site.in_features**2 * len(self.experts)

    @property
    def bytes(self) -> int:
        """What the bound counts."""
        return self.sum_bytes + self.working_bytes


def whole(site: Site) -> Part:
    """All experts of a site."""
    return Part(site, range(site.num_experts))


@dataclass(frozen=True)
class Pass:
    """One epoch: what is swept, which Hessians are gathered in it, and which weights are quantized after it.

    Attributes:
        kind: A survey gathers and quantizes nothing of its own.
        block: Index of the block.
        sites: Sites that are quantized when the pass is over; none where further chunks of them follow.
        ends_block: Whether the block is finished then.
        parts: Experts whose Hessians are gathered; all experts of ``sites`` where nothing had to be cut.
        chunk: Position and number of the passes that share the sites.
    """

    kind: Literal["survey", "calibrate"]
    block: int
    sites: tuple[Site, ...]
    ends_block: bool
    parts: tuple[Part, ...] = ()
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
        return f"block {self.block} {'+'.join(stages) if self.kind == 'calibrate' else 'survey'}{position}"


def build_schedule(
    sites_by_block: Sequence[tuple[Site, ...]],
    *,
    survey: bool,
    sequential: Sequential,
    first_block: int = 0,
    hessian_gib: float = math.inf,
) -> tuple[Pass, ...]:
    """Passes of a run over all blocks.

    Args:
        sites_by_block: Sites of every block.
        survey: Sweep every block of the original model first.
        sequential: "stage": one pass per stage of a block; "block": one pass per block (faster, less exact).
        first_block: Blocks before it are finished (a resumed run).
        hessian_gib: Bound on the Hessians of a pass, in GiB.

    Raises:
        ValueError: The Hessian of a single expert exceeds the bound.
    """
    passes = []
    if survey:
        passes = [Pass("survey", block, (), ends_block=False) for block in range(len(sites_by_block))]
    for block, sites in enumerate(sites_by_block):
        if block < first_block:
            continue
        if sequential == "block":
            groups = [sites]
        else:
            groups = [tuple(site for site in sites if site.stage == stage) for stage in STAGES]
            groups = [group for group in groups if group]
        for group in groups:
            chunks = list(cut(group, hessian_gib))
            for position, parts in enumerate(chunks, 1):
                last = position == len(chunks)
                ends_block = last and group is groups[-1]
                done = group if last else ()
                passes.append(Pass("calibrate", block, done, ends_block, parts, (position, len(chunks))))
    return tuple(passes)


def cut(sites: Sequence[Site], hessian_gib: float) -> Iterator[tuple[Part, ...]]:
    """Parts of the sites, in their order, in chunks that each stay within the bound.

    Args:
        sites: What is calibrated on the same state of the model.
        hessian_gib: The bound, in GiB.

    Raises:
        ValueError: The Hessian of a single expert exceeds the bound.
    """
    chunk: list[Part] = []
    for site in sites:
        start = 0
        while start < site.num_experts:
            room = hessian_gib * GIB - sum(part.bytes for part in chunk)
            if fit := _num_that_fit(site, room):
                chunk.append(Part(site, range(start, min(start + fit, site.num_experts))))
                start = chunk[-1].experts.stop
            elif chunk:
                yield tuple(chunk)
                chunk = []
            else:
                need = Part(site, range(1)).bytes / GIB
                raise ValueError(
                    f"hessian_gib ({hessian_gib:g}) must hold one Hessian of {site.name}, which needs {need:.3g} GiB "
                    f"({site.in_features} in features); set --model.hessian_gib {math.ceil(100 * need) / 100:g} or more"
                )
    yield tuple(chunk)


def _num_that_fit(site: Site, room: float) -> int:
    """How many experts of a site have Hessians of at most ``room`` bytes together."""
    one, two = (Part(site, range(count)).bytes for count in (1, 2))
    return 0 if room < one else site.num_experts if math.isinf(room) else int(1 + (room - one) // (two - one))
