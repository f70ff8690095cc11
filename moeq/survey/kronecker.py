"""Kronecker factors of the Fisher information at every linear, from sequences that run through the model and back.

    F = E[g g^T (x) x x^T]  ~  H_O (x) H_I,     g = d/dz log p(y | x), y drawn from p

for a linear z = W x: K-FAC's approximation (Martens and Grosse, 2015, arXiv 1503.05671), which holds exactly where the
two are independent.  Forward, what each block reads waits; backward, one block after another runs again, and its sums
are written before the next one's begin.  So one block, and the factors of one, are in memory at a time, and a killed
run gathers again only what it had not written.

Shapes: B batch, T tokens of a sequence, N tokens of an expert, E experts, O out features, I in features, V vocabulary.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from moeq.disk.waiting import WaitingStates
from moeq.distributed import rank_and_world, sum_over_ranks, wait_for_ranks
from moeq.fit.factors import Factors, SiteFactors
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import hand_on
from moeq.models.head import logits_behind
from moeq.quant.hessian import accumulate, empty_state
from moeq.survey.fisher import counted_tokens, observe_gradients, sampled_tokens, score_gradient
from moeq.survey.gradient_probe import as_leaf, batch_seed, pull_back
from moeq.survey.sweeps import BlockStates, Inputs, Show, captured, entered, keep_N, original, sweep_forward, visit


def gather_factors(
    adapter: Adapter,
    batches: Mapping[int, Inputs],
    blocks: Collection[int],
    factors: Factors,
    seed: int,
    waiting: WaitingStates,
    device: torch.device,
    show: Show,
) -> None:
    """Gather the factors of some blocks and write them.

    All ranks must call it.

    Args:
        adapter: The model, original weights.
        batches: This rank's share, by number in the whole set.
        blocks: At least one.
        factors: Where they are written.
        seed: Of the labels that are drawn.
        waiting: Where inputs of blocks and gradients wait.
        device: Where the model computes.
        show: Shows how far this is.

    Raises:
        ValueError: A sum is not finite.
    """
    states = BlockStates(waiting)
    if batches:
        sweep_forward(adapter, batches, states, show)
    for batch, inputs in batches.items():
        states.put(_gradient(batch), _at_the_end(adapter, batch, inputs, states, seed, device))
    for block in show(range(len(adapter.blocks) - 1, min(blocks) - 1, -1), "backward"):
        sites = adapter.sites(block) if block in blocks else ()
        sums = BlockSums(sites, device)
        if batches:
            with visit(adapter, block, block - 1):
                for batch, inputs in batches.items():
                    _pull_back_block(adapter, block, batch, inputs, states, sums, device)
        for site in sites:  # ranks without a batch take part
            sum_over_ranks(sums.of[site.name].tensors())
            _require_finite(site, sums.of[site.name])
        if sites and rank_and_world()[0] == 0:
            factors.write(block, sums.of)
    states.clear()
    wait_for_ranks()


def rank_batches(ids_NT: Tensor, batch_size: int, device: torch.device) -> dict[int, Inputs]:
    """This rank's share of the batches of a set, by number."""
    rank, world = rank_and_world()
    every = list(enumerate(ids_NT.split(batch_size)))
    return {batch: {"input_ids": ids_BT.to(device)} for batch, ids_BT in every[rank::world]}


class BlockSums:
    """Sums of the sites of one block.

    Args:
        sites: Of the block.
        device: Where the sums are.

    Attributes:
        of: By the name of the site.
    """

    def __init__(self, sites: Collection[Site], device: torch.device) -> None:
        self.of = {
            site.name: SiteFactors(
                empty_state(site.num_experts, sum(site.rows), device),
                empty_state(site.num_experts, site.in_features, device),
            )
            for site in sites
        }
        self._parts: dict[str, Tensor] = {}

    def on_input(self, site: Site, expert: int, x_NI: Tensor) -> None:
        """Add inputs, where this site is summed."""
        if site.name not in self.of:
            return
        accumulate(self.of[site.name].input, expert, x_NI, power=0.0)

    def on_gradient(self, site: Site, expert: int, rows: slice, gradient_NO: Tensor) -> None:
        """Add gradients likewise; those of linears side by side wait for each other until ``end_batch``."""
        if site.name not in self.of:
            return
        num_rows = sum(site.rows)
        if gradient_NO.shape[1] == num_rows:
            accumulate(self.of[site.name].output, expert, gradient_NO, power=0.0)
            return
        if site.name not in self._parts:
            self._parts[site.name] = gradient_NO.new_zeros(len(gradient_NO), num_rows)
        self._parts[site.name][:, rows] += gradient_NO

    def end_batch(self) -> None:
        """Add what waits."""
        for name, gradient_NO in self._parts.items():
            accumulate(self.of[name].output, 0, gradient_NO, power=0.0)
        self._parts.clear()


def _gradient(batch: int) -> tuple[str, int]:
    return "gradient", batch


def _at_the_end(
    adapter: Adapter, batch: int, inputs: Inputs, states: BlockStates, seed: int, device: torch.device
) -> Tensor:
    """Gradients at the last hidden states, one sequence at a time: logits are large."""
    generator = torch.Generator().manual_seed(batch_seed(seed, batch))
    found: list[Tensor] = []
    for row in range(len(inputs["input_ids"])):
        sequence = {name: value[row : row + 1] for name, value in inputs.items()}
        key = (*original(batch, len(adapter.blocks)), row)
        leaf = states.read(key, device)[0].detach().requires_grad_()
        states.drop(key)
        with torch.enable_grad():
            logits_1TV = logits_behind(adapter.model, adapter.blocks, sequence, leaf)
        ids_1T = sampled_tokens(logits_1TV.detach(), generator)
        score_1TV = score_gradient(logits_1TV, ids_1T, counted_tokens(sequence))
        found += torch.autograd.grad(logits_1TV, leaf, score_1TV)
    return torch.cat(found)


def _pull_back_block(
    adapter: Adapter, block: int, batch: int, inputs: Inputs, states: BlockStates, sums: BlockSums, device: torch.device
) -> None:
    """From the gradients at a block's output to those at its input, on one batch."""
    call, read = captured(adapter, inputs, block), None
    if block:
        read = states.read(original(batch, block), device)
        states.drop(original(batch, block))
    leaves = as_leaf(read[0] if read else call.hidden), as_leaf(read[1] if read else None)
    # Watched where nothing is summed, too: experts then run alike, and what is handed on has the same bits.
    with observe_gradients(adapter, adapter.sites(block), sums.on_gradient, keep_N(inputs), sums.on_input):
        with torch.enable_grad():
            made = hand_on(adapter.blocks[block], leaves[0], entered(call, *leaves))
        found = pull_back(leaves, made, states.read(_gradient(batch), device), keep_graph=False)
    sums.end_batch()
    states.drop(_gradient(batch))
    if block:
        states.put(_gradient(batch), *found)


def _require_finite(site: Site, sums: SiteFactors) -> None:
    for side, state in (("gradients at", sums.output), ("inputs of", sums.input)):
        # The trace is not finite where any value is not: it sums squares.
        if not bool(torch.isfinite(state.sum_EII.diagonal(dim1=1, dim2=2).sum())):
            raise ValueError(
                f"the {side} {site.name} have NaN or infinite values; load the model in bfloat16 or float32 rather "
                "than float16, or leave KroneckerFactors out"
            )
