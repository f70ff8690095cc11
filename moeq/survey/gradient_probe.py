"""The backward pass of a survey, block by block in reverse: squared gradients at every linear, gradients at outputs.

The gradient at the last hidden states comes from the model's own head.  Each block then runs again on the input that
waits for it, and hands the gradient at that input to the block below: what autograd of the whole model gives, with one
block at a time.  What a block hands on beside its hidden states carries a gradient, too, where it is no index.

Shapes: B batch, T tokens of a sequence, N = B T, D width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import hand_on
from moeq.models.head import logits_behind
from moeq.survey.fisher import (
    GradientState,
    add_squares,
    counted_tokens,
    empty_gradients,
    next_tokens,
    observe_gradients,
    sampled_tokens,
    score_gradient,
)
from moeq.survey.survey_spec import FISHER, SurveySpec
from moeq.survey.sweeps import BlockStates, Inputs, Show, captured, entered, keep_N, original, visit

# Whose log-likelihood is differentiated: of tokens that the model draws ("sampled"), or of the data's next ones.
Score = Literal["sampled", "data"]


class GradientProbe:
    """Gradients of the first batches, as far as a cost needs them.

    Args:
        adapter: The model, original weights.
        spec: Which costs, and the seed of the sampled tokens.
        waiting: Where gradients wait for the block below, and those at the blocks' outputs for ``at_output``.
        device: Where the model computes.

    Attributes:
        states: Squared gradients by site name, over all ranks, on the CPU; empty where no cost needs them.
    """

    def __init__(self, adapter: Adapter, spec: SurveySpec, waiting: WaitingStates, device: torch.device) -> None:
        self.adapter, self.spec, self._waiting, self._device = adapter, spec, waiting, device
        self.states: dict[str, GradientState] = {}
        wanted: dict[Score, bool] = {"sampled": spec.wants(FISHER), "data": "gemq" in spec.costs}
        self.scores = [score for score, is_wanted in wanted.items() if is_wanted]
        self._gradients = BlockStates(waiting)

    def find(self, batches: Mapping[int, Inputs], states: BlockStates, show: Show) -> None:
        """Go back from the loss to the first block.

        Args:
            batches: By number in the whole set, of which each rank has a share.
            states: What ``sweep_forward`` left of them.
            show: Shows how far this is.
        """
        if not self.scores:
            return
        for batch, inputs in batches.items():
            self._start(batch, inputs, states)
        blocks = range(len(self.adapter.blocks))
        for block in show(reversed(blocks), "backward"):
            sites = self.adapter.sites(block) if "sampled" in self.scores else ()
            sums = {site.name: empty_gradients(site, self._device) for site in sites}
            if batches:
                with visit(self.adapter, block, block - 1):
                    for batch, inputs in batches.items():
                        self._step(block, batch, inputs, states, sums)
            # Ranks without a batch take part: a sum waits for all of them.
            for name, state in sums.items():
                sum_over_ranks([state.sum_EO, state.num_tokens_E])
                self.states[name] = GradientState(state.sum_EO.cpu(), state.num_tokens_E.cpu())
        self._gradients.clear()

    def of_sites(self, sites: Sequence[Site]) -> dict[str, GradientState]:
        """Squared gradients of some sites, where the model computes; empty where no cost needs them."""
        found = {site.name: self.states[site.name] for site in sites if "sampled" in self.scores}
        return {
            name: GradientState(state.sum_EO.to(self._device), state.num_tokens_E.to(self._device))
            for name, state in found.items()
        }

    def at_output(self, batch: int, block: int) -> Tensor | None:
        """Gradient [N, D] of the data's log-likelihood at a block's output; it is kept no longer."""
        key = ("output", batch, block)
        return self._waiting.take(key, self._device) if key in self._waiting else None

    def _start(self, batch: int, inputs: Inputs, states: BlockStates) -> None:
        """Gradients at the last hidden states, one sequence at a time: logits are large."""
        adapter, generator = self.adapter, torch.Generator().manual_seed(batch_seed(self.spec.seed, batch))
        found: dict[Score, list[Tensor]] = {score: [] for score in self.scores}
        for row in range(len(inputs["input_ids"])):
            sequence = {name: value[row : row + 1] for name, value in inputs.items()}
            hidden, _ = states.read((*original(batch, len(adapter.blocks)), row), self._device)
            leaf = hidden.detach().requires_grad_()
            with torch.enable_grad():
                logits_1TV = logits_behind(adapter.model, adapter.blocks, sequence, leaf)
            for score in self.scores:
                if score == "sampled":
                    ids_1T, counted_1T = sampled_tokens(logits_1TV.detach(), generator), counted_tokens(sequence)
                else:
                    ids_1T, counted_1T = next_tokens(sequence)
                seed_1TV = score_gradient(logits_1TV, ids_1T, counted_1T)
                found[score] += torch.autograd.grad(logits_1TV, leaf, seed_1TV, retain_graph=score != self.scores[-1])
        for score, rows in found.items():
            self._gradients.put((score, batch), torch.cat(rows))

    def _step(
        self, block: int, batch: int, inputs: Inputs, states: BlockStates, sums: dict[str, GradientState]
    ) -> None:
        """From the gradients at a block's output to those at its input, on one batch."""
        call, read = captured(self.adapter, inputs, block), None
        if block:
            read = states.read(original(batch, block), self._device)
            states.drop(original(batch, block))
        leaves = as_leaf(read[0] if read else call.hidden), as_leaf(read[1] if read else None)
        listening, add = True, add_squares(sums)

        def on_gradient(site: Site, expert: int, rows: slice, gradient_NO: Tensor) -> None:
            if listening:
                add(site, expert, rows, gradient_NO)

        sites = self.adapter.sites(block)
        watched = observe_gradients(self.adapter, sites, on_gradient, keep_N(inputs)) if sums else nullcontext()
        with watched:
            with torch.enable_grad():
                made = hand_on(self.adapter.blocks[block], leaves[0], entered(call, *leaves))
            for score in self.scores:
                listening = score == "sampled"
                gradients = self._gradients.read((score, batch), self._device)
                if score == "data":
                    self._waiting.put(("output", batch, block), gradients[0].reshape(-1, gradients[0].shape[-1]))
                found = pull_back(leaves, made, gradients, keep_graph=score != self.scores[-1])
                self._gradients.drop((score, batch))
                if block:
                    self._gradients.put((score, batch), *found)


# Hidden states, or a gradient at them, and the same of what a block hands on beside them.
Pair = tuple[Tensor, Tensor | None]


def pull_back(leaves: Pair, made: Pair, gradients: Pair, *, keep_graph: bool) -> Pair:
    """Gradients at what a block read, from those at what it made of it.

    Args:
        leaves: What it read; without ``requires_grad`` where it has no gradient.
        made: What it made.
        gradients: At what it made; None where nothing further up reads it.
        keep_graph: Another gradient is to go back the same way.
    """
    pairs = zip(made, gradients, strict=True)
    outputs = [(value, given) for value, given in pairs if value is not None and given is not None]
    found = torch.autograd.grad(
        [value for value, _ in outputs], [leaf for leaf in leaves if leaf is not None and leaf.requires_grad],
        [given for _, given in outputs], retain_graph=keep_graph, allow_unused=True,
    )  # fmt: skip
    return found[0], found[1] if len(found) > 1 else None


def batch_seed(seed: int, batch: int) -> int:
    """Seed of the tokens that are sampled in a batch, a number below 2^63: one for every batch, whichever rank has it.

    The first 8 bytes, big-endian, of the SHA-256 of the ASCII text "<seed>,<batch>", without the highest bit.
    """
    return int.from_bytes(hashlib.sha256(f"{seed},{batch}".encode()).digest()[:8], "big") % 2**63


def as_leaf(value: Any) -> Any:
    """A tensor whose gradient can be asked for, where it is no index."""
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
