"""Learned rounding of the weights of one block, so that it returns what the original block returned.

The block is run in float32 on the inputs that the quantized blocks before it make, with weights that are dequantized
from latents (``moeq.quant.learned``); the target is the output of the original block on the original model's hidden
states, so what earlier blocks did wrong is repaired, too.  The result is judged as it will be used, rounded
to the model's dtype, on the calibration data, and thrown away where it is not better.

Under several ranks each rank draws from its own batches and the gradients are added up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from moeq.distributed import sum_over_ranks
from moeq.fit.activations import BlockBatch
from moeq.fit.run import Run
from moeq.fit.schedule import whole
from moeq.fit.solve import commit, make_units
from moeq.models.adapter import Adapter, Site
from moeq.models.blocks import run_block
from moeq.quant.learned import Backward, Latent, WeightOf, block_error, close_latent, open_latent
from moeq.quant.spec import QuantizedWeight

# Moves latents along the gradients of an error, by so many batches.
Learner = Callable[[Sequence[Latent], Backward, int], None]


@dataclass(frozen=True)
class _Stack:
    """Latents of one leaf of the experts of a site that share a grid."""

    site: Site
    experts: list[int]
    leaf: str
    rows: slice
    latent: Latent

    @property
    def names(self) -> list[str]:
        return [self.site.weight_name(expert, self.leaf) for expert in self.experts]


def tune_block(
    adapter: Adapter, run: Run, block: int, batches: Sequence[BlockBatch], learner: Learner
) -> tuple[float, float]:
    """Learn the rounding of a block whose weights are all quantized; writes what is better into run and model.

    Args:
        adapter: The model.
        run: Quantized weights are replaced; ``run.offsets`` holds those of the block.
        block: Which block.
        batches: This rank's calibration data at the block.
        learner: Moves the latents, as ``learn`` of a ``LearnedSpec``.

    Returns:
        The error of the block (``block_error``) before and after, over the data of all ranks.
    """
    module, sites = adapter.blocks[block], adapter.sites(block)
    device = next(module.parameters()).device
    stacks = list(_open(adapter, run, sites, device))
    latents = [stack.latent for stack in stacks]
    forward = _Forward(adapter, block, sites, stacks)

    def backward(index: int, weight_of: WeightOf) -> None:
        batch = batches[index]
        error = block_error(forward(batch, weight_of), batch.original_BTD.to(device), batch.keep_BT.to(device))
        error.backward()
        leaves = [leaf for latent in latents for leaf in (latent.level_EOGS, latent.log_EOG)]
        sum_over_ranks([leaf.grad for leaf in leaves if leaf.grad is not None])

    before = _mean_error(module, batches)
    with torch.enable_grad():
        learner(latents, backward, len(batches))
    solved = {name: run.quantized[name] for stack in stacks for name in stack.names}
    learned = [_closed(stack, solved) for stack in stacks]
    _write(adapter, run, sites, {name: weight for part in learned for name, weight in part.items()})
    after = _mean_error(module, batches)
    if not after < before:
        _write(adapter, run, sites, solved)
    return before, after


class _Forward:
    """The block in float32 with the weights that the latents stand for."""

    def __init__(self, adapter: Adapter, block: int, sites: Sequence[Site], stacks: Sequence[_Stack]) -> None:
        self.adapter, self.sites, self.stacks = adapter, sites, stacks
        self.module = adapter.blocks[block]
        self.prefix = f"{adapter.block_prefix}.{block}."
        self.parameters = {name: value.detach().float() for name, value in self.module.named_parameters()}
        self.weights = {site: adapter.get_weight(site).float() for site in sites}

    def __call__(self, batch: BlockBatch, weight_of: WeightOf) -> Tensor:
        parameters = dict(self.parameters)
        for site in self.sites:
            weight_EOI = self.weights[site].clone()
            for stack in self.stacks:
                if stack.site is site:
                    weight_EOI[stack.experts, stack.rows] = weight_of(stack.latent)
            values = self.adapter.parameters_of(site, weight_EOI)
            parameters |= {name.removeprefix(self.prefix): value for name, value in values.items()}
        device = next(iter(self.parameters.values())).device
        args, kwargs = tree_map(_in_float32, (batch.call.args, batch.call.kwargs))
        hidden_BTD = batch.hidden_BTD.to(device).float()
        output: Any = functional_call(self.module, parameters, (hidden_BTD, *args), kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


def _open(adapter: Adapter, run: Run, sites: Sequence[Site], device: torch.device) -> Iterator[_Stack]:
    for unit in make_units([whole(site) for site in sites], run.plan, max(site.num_experts for site in sites)):
        ends = torch.tensor(unit.site.rows).cumsum(0).tolist()
        for index in unit.leaves:
            leaf, rows = unit.site.leaves[index], slice(ends[index] - unit.site.rows[index], ends[index])
            names = [unit.site.weight_name(expert, leaf) for expert in unit.experts]
            offset_EOI = torch.stack([run.offsets[name] for name in names]).to(device)
            latent = open_latent([run.quantized[name] for name in names], offset_EOI)
            yield _Stack(unit.site, list(unit.experts), leaf, rows, latent)


def _closed(stack: _Stack, solved: dict[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    learned = close_latent(stack.latent, [solved[name] for name in stack.names])
    return {name: weight.each(Tensor.cpu) for name, weight in zip(stack.names, learned, strict=True)}


def _write(adapter: Adapter, run: Run, sites: Sequence[Site], weights: dict[str, QuantizedWeight]) -> None:
    run.quantized |= weights
    commit(adapter, sites, run.quantized)


@torch.no_grad()
def _mean_error(module: nn.Module, batches: Sequence[BlockBatch]) -> float:
    """Over all tokens of all ranks, with the module as it is."""
    device = next(module.parameters()).device
    total, count = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        output_BTD = run_block(module, batch.hidden_BTD.to(device), batch.call)
        keep_BT = batch.keep_BT.to(device)
        num = keep_BT.sum()
        total += num * block_error(output_BTD, batch.original_BTD.to(device), keep_BT)
        count += num
    sum_over_ranks([total, count])
    return float(total / count)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
