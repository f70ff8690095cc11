"""First-order change of the KL of an assembled model when one weight gets another candidate.

    slope_w(c) = <d KL / d W_w, W_w(c) - W_w>,     W_w(c) the candidate of a choice, W_w that of the plan

The gradient is taken at the quantized model, so it holds what the errors of all other weights do to the change.  It
comes block by block in reverse, as in ``gradient_probe.py``; that of a weight is used up at its block.  Blocks run in
float32: products of short floats backwards are slow on CPUs, and slopes are small differences.

Shapes: B batch, T tokens of a sequence, D width, E experts, O out features of a site, I in features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from moeq.allocation.evidence import CostTable
from moeq.allocation.plan import Choice
from moeq.distributed import sum_over_ranks
from moeq.models.adapter import Site
from moeq.models.blocks import BlockCall
from moeq.survey.assembled import AssembledModels, Branch
from moeq.survey.candidates import Plan
from moeq.survey.gradient_probe import Pair
from moeq.survey.sweeps import Show, captured, entered, visit

Choices = Mapping[Site, list[Choice]]


def plan_slopes(models: AssembledModels, plan: Plan, choices: Choices, show: Show) -> CostTable:
    """Slopes in nats per token by weight of the plan and choice, over the tokens of all ranks.

    Args:
        models: The model with the candidates, and batches.
        plan: Where the slopes are taken.
        choices: Of every site.
        show: Shows how far the two sweeps are.
    """
    adapter = models.adapter
    models.know_original(show)
    branches, blocks = [Branch(("assembled",), (0,))], range(len(adapter.blocks))
    for block in show(blocks, "plan"):
        with visit(adapter, block, block + 1):
            branches += models.run_block(block, branches[-1:], [plan])
    gradients, num_tokens = _at_the_end(models, branches[-1])
    models.drop(branches[-1].key)
    table: dict[str, dict[Choice, float]] = {}
    for block in show(reversed(blocks), "slopes"):
        with visit(adapter, block, block - 1):
            sums = _pull_back_block(models, block, branches[block], plan, gradients)
            table |= _changes(models, block, plan, choices, sums, num_tokens)
        models.drop(branches[block].key)
    return table


def _at_the_end(models: AssembledModels, branch: Branch) -> tuple[dict[int, Pair], Tensor]:
    """Gradients of the summed KL at the last hidden states by batch, and the number of tokens of all ranks."""
    found: dict[int, list[Tensor]] = {batch: [] for batch in models.batches}
    num_tokens = torch.zeros((), dtype=torch.float64, device=models.device)
    for batch, row in models.rows():
        with torch.enable_grad():
            hidden_1TD, logits_1TV = models.logits(branch.key, batch, row)
        # d KL / d logits = Q - P
        p_1TV = models.original_logits(batch, row).float().softmax(-1)
        seed_1TV = logits_1TV.detach().float().softmax(-1) - p_1TV
        mask_BT = models.batches[batch].get("attention_mask")
        keep_1T = torch.ones_like(seed_1TV[..., 0]) if mask_BT is None else mask_BT[row : row + 1].to(seed_1TV)
        num_tokens += keep_1T.double().sum()
        seed_1TV = (seed_1TV * keep_1T.unsqueeze(-1)).to(logits_1TV.dtype)
        found[batch] += torch.autograd.grad(logits_1TV, hidden_1TD, seed_1TV)
    sum_over_ranks([num_tokens])
    return {batch: (torch.cat(rows).float(), None) for batch, rows in found.items()}, num_tokens


def _pull_back_block(
    models: AssembledModels, block: int, branch: Branch, plan: Plan, gradients: dict[int, Pair]
) -> dict[Site, Tensor]:
    """Gradients of the summed KL in the weights of a block, [E, O, I]; those at its inputs take the outputs' place."""
    adapter, module = models.adapter, models.adapter.blocks[block]
    prefix, sites = f"{adapter.block_prefix}.{block}.", adapter.sites(block)
    calls = {batch: captured(adapter, inputs, block) for batch, inputs in models.batches.items()}
    with models.candidates.in_place(block, plan):
        fixed = {name: value.detach().float() for name, value in module.named_parameters()}
        weights = {site: adapter.get_weight(site).float() for site in sites}
    sums = {site: torch.zeros_like(weight_EOI) for site, weight_EOI in weights.items()}
    for batch, call in calls.items():
        read = models.states.read((*branch.key, batch), models.device) if block else (call.hidden, None)
        leaves = _leaf(read[0]), _leaf(read[1])
        with torch.enable_grad():
            own = [adapter.parameters_of(site, weights[site].requires_grad_()) for site in sites]
            learnable = {name.removeprefix(prefix): value for values in own for name, value in values.items()}
            made = _run(module, fixed | learnable, entered(call, *leaves))
        gradients[batch], found = _gradients(made, gradients[batch], leaves, [weights[site] for site in sites])
        for site, gradient_EOI in zip(sites, found, strict=True):
            sums[site] += 0.0 if gradient_EOI is None else gradient_EOI
    return sums


def _gradients(
    made: Pair, at_output: Pair, leaves: Pair, weights: Sequence[Tensor]
) -> tuple[Pair, Sequence[Tensor | None]]:
    """From gradients at what a block made to those at what it read, and in its weights."""
    both = zip(made, at_output, strict=True)
    pairs = [(value, given) for value, given in both if value is not None and given is not None]
    inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = torch.autograd.grad(
        [value for value, _ in pairs], [*inputs, *weights], [given for _, given in pairs], allow_unused=True
    )
    return (found[0], found[1] if len(inputs) > 1 else None), found[len(inputs) :]


def _run(module: nn.Module, parameters: dict[str, Tensor], call: BlockCall) -> Pair:
    """A block in float32 with given parameters: its hidden states, and what it hands on beside them."""
    hidden, args, kwargs = tree_map(_in_float32, (call.hidden, call.args, call.kwargs))
    output: Any = functional_call(module, parameters, (hidden, *args), kwargs)
    if not isinstance(output, tuple):
        return output, None
    return output[0], output[1] if len(output) > 1 else None


@torch.no_grad()
def _changes(
    models: AssembledModels, block: int, plan: Plan, choices: Choices, sums: Mapping[Site, Tensor], num_tokens: Tensor
) -> dict[str, dict[Choice, float]]:
    """Slopes of the weights of a block, from the gradients of this rank's tokens."""
    found: dict[tuple[str, Choice], Tensor] = {}
    for site, gradient_EOI in sums.items():
        start = 0
        for leaf, rows in zip(site.leaves, site.rows, strict=True):
            for expert in range(site.num_experts):
                name, gradient_OI = site.weight_name(expert, leaf), gradient_EOI[expert, start : start + rows]
                if name not in plan:
                    continue
                now_OI = models.candidates.read(name, Choice.of(plan[name])).to(gradient_OI)
                for choice in choices[site]:
                    change_OI = models.candidates.read(name, choice).to(gradient_OI) - now_OI
                    found[name, choice] = (gradient_OI * change_OI).sum(dtype=torch.float64)
            start += rows
    slopes_N = torch.stack(list(found.values())) if found else torch.zeros(0, dtype=torch.float64)
    sum_over_ranks([slopes_N])
    table: dict[str, dict[Choice, float]] = {}
    for (name, choice), slope in zip(found, (slopes_N / num_tokens).tolist(), strict=True):
        table.setdefault(name, {})[choice] = slope
    return table


def _leaf(value: Any) -> Any:
    """A tensor whose gradient can be asked for, where it is no index; in float32."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().float().requires_grad_()


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
