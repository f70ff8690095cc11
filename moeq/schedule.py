"""The passes of a run: one sweep of the calibration batches through one block is one epoch.

A survey of every block comes first where a step asked for one.  Then each block has its calibration passes, in the
order of the data flow, so that each linear sees inputs made by already quantized ones (design: one pass per stage).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeq.models.adapter import STAGES, Site

Sequential = Literal["stage", "block"]


@dataclass(frozen=True)
class Pass:
    """One epoch: what is swept, and which sites are calibrated in it (none in a survey)."""

    kind: Literal["survey", "calibrate"]
    block: int
    sites: tuple[Site, ...]
    ends_block: bool

    @property
    def label(self) -> str:
        """Short description for progress bars and logs."""
        stages = dict.fromkeys(site.stage for site in self.sites)
        return f"block {self.block} {'+'.join(stages) if self.kind == 'calibrate' else 'survey'}"


def build_schedule(
    sites_by_block: Sequence[tuple[Site, ...]], *, survey: bool, sequential: Sequential, first_block: int = 0
) -> tuple[Pass, ...]:
    """Passes of a run over all blocks.

    Args:
        sites_by_block: Sites of every block.
        survey: Sweep every block of the original model first.
        sequential: "stage": one pass per stage of a block; "block": one pass per block (faster, less exact).
        first_block: Blocks before it are finished (a resumed run).
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
        passes += [Pass("calibrate", block, group, ends_block=group is groups[-1]) for group in groups]
    return tuple(passes)
