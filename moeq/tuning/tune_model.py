"""The steps of end-to-end tuning: batches forward, back, and a step of Adam for each block on the way back.

No gradient of more than one block is ever held: a block's leaves move as soon as the batch has gone back through it,
which changes nothing for the blocks below.  Ranks take batches of their own, and their gradients and the tokens of
their experts are summed in one order, so all of them hold the same leaves.  Now and then the held-out batches are
measured, and a state that is better than all before it is written down.

Nothing is drawn at random but the order of the batches, which follows from the seed: a tuning that was killed begins
again and ends with the same bits.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moeq.distributed import rank_and_world, sum_over_ranks
from moeq.models.adapter import Adapter
from moeq.tuning.adam import adam_step
from moeq.tuning.keeper import LeafKeeper
from moeq.tuning.leaves import Leaf
from moeq.tuning.originals import Show, read_batch
from moeq.tuning.prediction import loss_and_gradient
from moeq.tuning.sorted_experts import sorted_experts
from moeq.tuning.through_blocks import pass_backward, pass_forward
from moeq.tuning.tuning_spec import TuningSpec


@dataclass
class Progress:
    """What a tuning has come to.

    Attributes:
        before: Loss per held-out token at the beginning.
        checks: Steps made and the loss then.
        best: The least of them, ``before`` included.
        tokens: Tokens that each expert has learned from, int64 [E], by path of the experts module.
    """

    before: float
    checks: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    tokens: dict[str, Tensor] = field(default_factory=dict)


class Tuning:
    """A model whose leaves learn.

    Args:
        adapter: The model; what lies outside of its blocks, and whatever is no leaf, is as it is to be exported.
        keeper: Leaves of all blocks.
        spec: Settings.
        folder: Of the originals.
        streamed: Whether blocks come and go.
    """

    def __init__(self, adapter: Adapter, keeper: LeafKeeper, spec: TuningSpec, folder: Path, *, streamed: bool) -> None:
        self.adapter, self.keeper, self.spec, self.folder = adapter, keeper, spec, folder
        self._keep = not (streamed or spec.recompute)
        self._device = adapter.model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._tokens: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64))

    def run(self, better: Callable[[], None], show: Show) -> Progress:
        """Make all steps.

        Args:
            better: Writes the current state down: it is the best so far.
            show: Shows how far this is.
        """
        spec, (rank, world) = self.spec, rank_and_world()
        num_steps = spec.num_steps(world)
        checks = {num_steps * (n + 1) // spec.num_checks for n in range(spec.num_checks)} - {0}
        with sorted_experts(self.adapter.expert_modules()) as counts:
            progress = Progress(self.held_out_loss())
            progress.best = progress.before
            batches = self._order(rank, world)
            for step in show(range(num_steps), "tuning"):
                self._step(next(batches), world, rate_share(step, num_steps, spec.warmup), counts)
                if step + 1 in checks:
                    progress.checks.append((step + 1, self.held_out_loss()))
                    if progress.checks[-1][1] < progress.best:
                        progress.best = progress.checks[-1][1]
                        better()
        progress.tokens = dict(self._tokens)
        return progress

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Loss per token over the held-out batches of all ranks."""
        rank, world = rank_and_world()
        total, count = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in range(self.spec.num_held_out)[rank::world]:
            ids_BT, original = self._read(batch)
            passage = pass_forward(self.adapter, {"input_ids": ids_BT}, self._parameters, read=False)
            total += loss_and_gradient(self.adapter, ids_BT, passage.last, original, self.spec)[0]
            count += ids_BT.numel()
        sum_over_ranks([total, count])
        return float(total / count)

    def _order(self, rank: int, world: int) -> Iterator[int]:
        """Batches of this rank; those that are held out come first in the files, and never here."""
        spec = self.spec
        generator = torch.Generator().manual_seed(spec.seed)
        for _ in range(spec.num_epochs):
            order = spec.num_held_out + torch.randperm(spec.num_batches - spec.num_held_out, generator=generator)
            yield from order[: len(order) // world * world][rank::world].tolist()

    def _read(self, batch: int) -> tuple[Tensor, Tensor]:
        ids_BT, original = read_batch(self.folder, batch)
        return ids_BT.to(self._device), original.to(self._device)

    def _parameters(self, block: int) -> dict[str, Tensor]:
        return self.keeper.leaves(block).parameters()

    def _step(self, batch: int, world: int, share: float, counts: dict[str, Tensor]) -> None:
        ids_BT, original = self._read(batch)
        opened = {}

        def parameters(block: int) -> dict[str, Tensor]:
            opened[block] = self.keeper.leaves(block)
            return opened[block].parameters()

        def after(block: int) -> None:
            self._move(block, opened.pop(block).leaves, share, counts)

        passage = pass_forward(self.adapter, {"input_ids": ids_BT}, parameters, keep=self._keep)
        if not self._keep:
            opened.clear()
        _, gradient = loss_and_gradient(self.adapter, ids_BT, passage.last, original, self.spec)
        pass_backward(self.adapter, passage, gradient / (ids_BT.numel() * world), parameters, after)

    def _move(self, block: int, leaves: dict[str, Leaf], share: float, counts: dict[str, Tensor]) -> None:
        """One step for the leaves of a block, in which only experts that had tokens take part."""
        prefix = f"{self.adapter.block_prefix}.{block}."
        seen = {path: tokens_E.to(self._device) for path, tokens_E in counts.items() if path.startswith(prefix)}
        gradients = [
            leaf.value.grad if leaf.value.grad is not None else torch.zeros_like(leaf.value) for leaf in leaves.values()
        ]
        sum_over_ranks([*seen.values(), *gradients])
        for path, tokens_E in seen.items():
            self._tokens[path] = self._tokens[path] + tokens_E.cpu()
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            active_E = None
            if leaf.experts is not None:
                path, experts = leaf.experts
                active_E = seen[path][list(experts)] > 0
            moments = self.keeper.moments(block, key, leaf.value)
            adam_step(leaf.value, gradient, moments, share * leaf.rate, active_E)
            if leaf.bound is not None:  # a level far outside of the grid would take many steps to come back
                leaf.value.data.clamp_(*leaf.bound)
            leaf.value.grad = None
            self.keeper.keep(block, key, leaf.value, moments)


def rate_share(step: int, num_steps: int, warmup: float) -> float:
    """What is left of the rates in a step: up along a line, then down along a cosine."""
    num_warm = warmup * num_steps
    if step < num_warm:
        return (step + 1) / (num_warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warm) / max(1.0, num_steps - num_warm)))
