"""KL of assembled quantized models: many plans measured in one sweep over the blocks.

    KL(plan) = mean over tokens of KL(original || model with the candidate of every weight that the plan chooses)

Nothing is predicted.  All plans go through a block before any goes through the next one, so that a block is resident
once for all of them, and plans that agree on all blocks so far are run once.

Shapes: B batch, T tokens of a sequence, V vocabulary, P plans, last dimension 2: KL summed over tokens, and tokens.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Adapter
from moeq.models.blocks import hand_on
from moeq.models.head import logits_behind
from moeq.scoring.divergence import kl_sum_and_agreement
from moeq.survey.candidates import Candidates, Plan
from moeq.survey.sweeps import BlockStates, Inputs, Key, Show, captured, entered, visit

ORIGINAL: Key = ("assembled", "original")


@dataclass(frozen=True)
class Branch:
    """Plans that agree on all blocks so far: what they read next waits under ``key`` and the batch's number."""

    key: Key
    plans: tuple[int, ...]


class AssembledModels:
    """Measures plans on batches that no candidate was solved on.

    Args:
        adapter: The model, original weights.
        candidates: Solved weights, of every choice of the plans.
        batches: Of this rank, by number in the whole set.
        states: Where hidden states wait; the last ones of the original model wait until the end.
        device: Where the model computes.
    """

    def __init__(
        self, adapter: Adapter, candidates: Candidates, batches: Mapping[int, Inputs], states: BlockStates,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.adapter, self.candidates, self.batches = adapter, candidates, batches
        self.states, self.device = states, torch.device(device)
        self._knows_original = False

    def measure(self, plans: Sequence[Plan], show: Show) -> list[float]:
        """Nats per token of every plan, over the tokens of all ranks.

        Args:
            plans: Grids by name, of choices that have candidates.
            show: Shows how far the sweep is.
        """
        self.know_original(show)
        branches, blocks = [Branch(("assembled",), tuple(range(len(plans))))], range(len(self.adapter.blocks))
        for block in show(blocks, "plans"):
            with visit(self.adapter, block, block + 1):
                before, branches = branches, self.run_block(block, branches, plans)
            for branch in before:
                self.drop(branch.key)
        sums_P2 = torch.zeros(len(plans), 2, dtype=torch.float64, device=self.device)
        for branch in branches:
            sums_P2[list(branch.plans)] = self._divergence(branch.key)
            self.drop(branch.key)
        sum_over_ranks([sums_P2])
        return [kl_sum / num_tokens for kl_sum, num_tokens in sums_P2.tolist()]

    def know_original(self, show: Show) -> None:
        """Run the original model, once."""
        if self._knows_original:
            return
        branches, blocks = [Branch(("assembled",), ())], range(len(self.adapter.blocks))
        for block in show(blocks, "original"):
            with visit(self.adapter, block, block + 1):
                before, branches = branches, self.run_block(block, branches, [])
            self.drop(before[0].key)
        self._knows_original = True

    @torch.no_grad()
    def run_block(self, block: int, branches: Sequence[Branch], plans: Sequence[Plan]) -> list[Branch]:
        """Take branches through a resident block, where they may part; what they read goes on waiting."""
        names = [name for site in self.adapter.sites(block) for name in site.weight_names()]
        calls = {batch: captured(self.adapter, inputs, block) for batch, inputs in self.batches.items()}
        found = []
        for branch in branches:
            parts: dict[object, list[int]] = {}
            for plan in branch.plans:
                parts.setdefault(tuple(plans[plan].get(name) for name in names), []).append(plan)
            for members in parts.values() or [[]]:
                after = Branch(("assembled", block, members[0]) if members else (*ORIGINAL, block), tuple(members))
                with self.candidates.in_place(block, plans[members[0]]) if members else nullcontext():
                    for batch, call in calls.items():
                        if block:
                            call = entered(call, *self.states.read((*branch.key, batch), call.hidden.device))
                        made = hand_on(self.adapter.blocks[block], call.hidden, call)
                        if block + 1 < len(self.adapter.blocks):
                            self.states.put((*after.key, batch), *made)
                        else:
                            self.states.put_rows((*after.key, batch), made[0])
                found.append(after)
        return found

    def logits(self, key: Key, batch: int, row: int) -> tuple[Tensor, Tensor]:
        """Last hidden states [1, T, D] of one sequence of a branch, which may get a gradient, and their logits."""
        sequence = {name: value[row : row + 1] for name, value in self.batches[batch].items()}
        hidden_1TD = (
            self.states.read((*key, batch, row), self.device)[0].detach().requires_grad_(torch.is_grad_enabled())
        )
        return hidden_1TD, logits_behind(self.adapter.model, self.adapter.blocks, sequence, hidden_1TD)

    @torch.no_grad()
    def original_logits(self, batch: int, row: int) -> Tensor:
        """Logits of the original model, [1, T, V]."""
        return self.logits((*ORIGINAL, len(self.adapter.blocks) - 1), batch, row)[1]

    def rows(self) -> list[tuple[int, int]]:
        """Batch and row of every sequence of this rank."""
        return [(batch, row) for batch, inputs in self.batches.items() for row in range(len(inputs["input_ids"]))]

    def drop(self, key: Key) -> None:
        """Forget what a branch has made."""
        for batch in self.batches:
            self.states.drop((*key, batch))
        for batch, row in self.rows():
            self.states.drop((*key, batch, row))

    @torch.no_grad()
    def _divergence(self, key: Key) -> Tensor:
        """KL summed over the tokens of this rank, and these; one sequence at a time, as logits are large."""
        sums_2 = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, row in self.rows():
            mask_BT = self.batches[batch].get("attention_mask")
            mask_1T = None if mask_BT is None else mask_BT[row : row + 1]
            logits_1TV = self.logits(key, batch, row)[1]
            kl_sum, _, num_tokens = kl_sum_and_agreement(self.original_logits(batch, row), logits_1TV, mask_1T)
            sums_2 += torch.stack([kl_sum, num_tokens.double()])
        return sums_2
