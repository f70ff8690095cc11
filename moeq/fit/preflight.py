"""What a fit is going to take, phase by phase, from its schedule and the shapes of its model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moeq.fit.duration import Speed, block_products, pass_seconds, solve_seconds
from moeq.fit.memory import (
    DataShape,
    gather_bytes,
    gather_together_bytes,
    hessian_bytes,
    kernel_bytes,
    stack_bytes,
)
from moeq.fit.run import Needs
from moeq.fit.schedule import Pass, SitePart, whole
from moeq.fit.share import experts_per_unit
from moeq.models.adapter import Adapter
from moeq.models.sizes import ModelBytes, forward_bytes, hidden_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.quant.workspace import two_sided_numbers, workspace_bytes


@dataclass(frozen=True)
class FitWork:
    """What is known of a fit before it starts.

    Attributes:
        adapter: The model, of which shapes are read.
        schedule: Its passes.
        model: Its bytes.
        data: The calibration data.
        block_files: Bytes of the file of every block.
        num_quantized: Elements of all weights that are quantized.
        experts_per_token: K.
        needs: What the steps ask for.
        hidden_bytes: Bound on hidden states that wait in memory.
        device_type: Where the model computes: "cpu" or "cuda".
        solved: Whether a step solves the weights.
        num_ranks: Ranks that divide batches and solves.
        speed: What was measured; None where nothing was.
    """

    adapter: Adapter
    schedule: tuple[Pass, ...]
    model: ModelBytes
    data: DataShape
    block_files: tuple[int, ...]
    num_quantized: int
    experts_per_token: int
    needs: Needs
    hidden_bytes: int
    device_type: str
    solved: bool
    num_ranks: int = 1
    speed: Speed | None = None

    @property
    def waiting(self) -> dict[str, int]:
        """What stays in main memory from pass to pass, by name: hidden states, and kernels of the CPU's library."""
        return {"hidden states": min(self.hidden_bytes, self._states), **self.kernels}

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels that the CPU's library keeps, by name; none where products are not in bfloat16 on a CPU."""
        routed = [site for site in self.adapter.all_sites() if site.kind == "routed" and site.stage == "mlp_in"]
        if self.device_type != "cpu" or not routed or self.adapter.dtype_of(routed[0]) != torch.bfloat16:
            return {}
        num_blocks = len(self.adapter.blocks)
        return {"kernels": kernel_bytes(routed[0], self.data, num_blocks, self.experts_per_token)}

    @property
    def waiting_on_disk(self) -> int:
        """Hidden states that do not: in a file without a name, which is gone in the end."""
        return max(0, self._states - self.hidden_bytes)

    @property
    def num_batches(self) -> int:
        """Steps of one sweep on one rank."""
        return -(-self.data.num_batches // self.num_ranks)

    def codes(self, parts: Iterable[SitePart]) -> dict[str, int]:
        """Codes of parts that are solved, by name; on the CPU until their block is finished."""
        numel = sum(sum(part.site.rows) * part.site.in_features * len(part.experts) for part in parts)
        return {"codes": numel, "places in cells": 2 * numel if self.needs.offsets else 0}

    @property
    def _states(self) -> int:
        """All hidden states of this rank."""
        tokens = self.num_batches * self.data.batch_tokens
        return hidden_bytes(self.adapter, min(tokens, self.data.num_tokens)) * (2 if self.needs.originals else 1)


def fit_phases(work: FitWork, replaced: Mapping[str, Phase] | None = None) -> tuple[Phase, ...]:
    """Phases of the passes of a fit, in their order.

    Args:
        work: What is known.
        replaced: Phases that stand for the sweep of a pass, by its label.
    """
    phases: list[Phase] = []
    solved: list[SitePart] = []
    resident = None
    for current in work.schedule:
        if work.model.streamed and current.block != resident:
            phases.append(load_phase(work, current.block))
        resident = current.block
        phases.append((replaced or {}).get(current.label) or sweep_phase(work, current, solved))
        if current.kind == "calibrate" and work.solved:
            phases.append(solve_phase(work, current, solved))
            solved += current.parts
        if current.ends_block and work.solved:
            phases.append(block_file_phase(work, current.block, solved))
            solved = []
    return tuple(phases)


def load_phase(work: FitWork, block: int) -> Phase:
    """A block comes from the files."""
    held = Moment(work.model.held(block), {**work.waiting, "parts from files": work.model.loading[block]})
    seconds = None if work.speed is None else work.model.stored[block] / work.speed.read
    return Phase("load block", f"block {block} load", (held,), seconds=seconds)


def sweep_phase(work: FitWork, current: Pass, solved: Sequence[SitePart] = ()) -> Phase:
    """All batches run through a block, as far as the pass needs it; ``solved`` is what is solved of it already."""
    tokens = work.data.batch_tokens
    if work.device_type == "cpu":
        gathered = gather_bytes(current.parts, tokens)
    else:
        gathered = gather_together_bytes(current.parts, tokens, work.experts_per_token)
    held = {
        **work.model.held(current.block),
        **hessian_bytes(current.parts),
        "activations": forward_bytes(work.adapter, current.block, tokens, work.data.length) + gathered,
    }
    seconds = None
    if work.speed is not None:
        products = block_products(work.adapter.sites(current.block), tokens, work.experts_per_token)
        seconds = pass_seconds(current, work.speed, work.num_batches, products)
    return Phase(
        sweep_kind(current), current.label, (Moment(held, {**work.waiting, **work.codes(solved)}),), seconds=seconds
    )


def sweep_kind(current: Pass) -> str:
    """What the table calls the sweep of a pass."""
    if current.kind != "calibrate":
        return current.kind
    stages = {site.stage for site in current.observed}
    return f"calibrate {stages.pop() if len(stages) == 1 else 'block'}"


def solve_phase(work: FitWork, current: Pass, solved: Sequence[SitePart] = ()) -> Phase:
    """The weights of a pass are solved on its Hessians, one stack after another."""
    codes = work.codes([*solved, *current.parts])
    moments = [_solve_moment(work, current, part, codes) for part in current.parts]
    seconds = None if work.speed is None else solve_seconds(current.parts, work.speed) / work.num_ranks
    return Phase("solve", f"{current.label} solve", tuple(moments), seconds=seconds)


def _solve_moment(work: FitWork, current: Pass, part: SitePart, codes: Mapping[str, int]) -> Moment:
    site, rows = part.site, sum(part.site.rows)
    num_experts = min(len(part.experts), experts_per_unit(rows, site.in_features))
    held = {
        **work.model.held(current.block),
        **hessian_bytes(current.parts),
        "Hessians to solve": 4 * site.in_features**2 * num_experts,
        "weights to solve": stack_bytes(work.adapter, site, num_experts),
        "workspace": workspace_bytes(num_experts, rows, site.in_features, work.device_type),
        "codes of the stack": num_experts * rows * site.in_features,
    }
    if work.needs.factors:
        held["factors to solve"] = 4 * num_experts * two_sided_numbers(rows, site.in_features)
    return Moment(held, {**work.waiting, **codes})


def block_file_phase(work: FitWork, block: int, solved: Sequence[SitePart]) -> Phase:
    """The codes of a finished block are packed, written, and leave memory."""
    size = work.block_files[block]
    moment = Moment(work.model.held(block), {**work.waiting, **work.codes(solved), "packed codes": 2 * size})
    seconds = None if work.speed is None else size / work.speed.write
    return Phase("block file", f"block {block} file", (moment,), disk=size, seconds=seconds)


def learning_phases(work: FitWork, num_steps: int) -> tuple[Phase, ...]:
    """Learned rounding of every block that is finished in this run.

    In float32 for each weight: latent level, its gradient and two moments of Adam, the weights as they were, those that
    the latents stand for, and two of what the gradients pass through; and the block itself, where it is not float32.
    Activations are float32, too, and kept for the way back.
    """
    blocks = sorted({current.block for current in work.schedule if current.ends_block})
    return tuple(_learning_phase(work, block, num_steps) for block in blocks)


def _learning_phase(work: FitWork, block: int, num_steps: int) -> Phase:
    sites = work.adapter.sites(block)
    numel = sum(sum(site.rows) * site.in_features * site.num_experts for site in sites)
    itemsize = work.adapter.dtype_of(sites[0]).itemsize
    held = {
        **work.model.held(block),
        "latents": 16 * numel,
        "weights in float32": (16 if itemsize == 4 else 20) * numel,
        "activations": 8 // itemsize * forward_bytes(work.adapter, block, work.data.batch_tokens, work.data.length),
    }
    codes = work.codes([whole(site) for site in sites])
    seconds = None if work.speed is None else 3 * num_steps * work.speed.forward
    moment = Moment(held, {**work.waiting, **codes})
    return Phase("learned rounding", f"block {block} learned rounding", (moment,), seconds=seconds)


def largest_hessians(schedule: Sequence[Pass]) -> int:
    """Hessians of the largest pass of a schedule, as its bound counts them."""
    return max((sum(part.bytes for part in current.parts) for current in schedule), default=0)


def least_hessians(schedule: Sequence[Pass]) -> int:
    """Hessians of the largest single expert, without which no pass can be made."""
    sites = {part.site for current in schedule for part in current.parts}
    return max((replace(whole(site), experts=range(1)).bytes for site in sites), default=0)
