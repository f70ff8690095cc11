"""Learned rounding: levels and scales of finished weights move along gradients of an error that spans linears.

GPTQ rounds each linear alone; what a block of the model returns depends on all of them at once.  As in SignRound (Cheng
et al., 2023, arXiv 2309.05516) and the block stage of EfficientQAT (Chen et al., 2024, arXiv 2407.11062), every weight
gets

    real = (clamp(round(u), 0, 2^bits - 1) - zero_point) * s exp(v)

with latent levels u and log-scales v.  On a two-level grid v moves the d of a super-block, and the integers and offsets
stay.  The result is codes, scales and zero points as before, on the same grid, at no cost for who runs the model.

Gradients pass the rounding unchanged (straight-through), or the choice of levels is soft: while a block is learned, the
level of a weight is then a mean of the codes around u,

    level = sum over codes k of p_k k,    p_k proportional to exp(-(u - k)^2 / (2 h)),    h = softness (1 - t)^3,

with t the share of the steps that are done, so that what is soft at first ends on the codes.  This is the
relaxation of GSQ (Dadgarnia et al., 2026, arXiv 2604.18556) with one latent for each weight in place of one for each
level, of which the three nearest count, and without its noise.  GSQ's sharpness over its temperature makes about this
fall; with a linear one levels harden in the last steps, which no step is left to repair.  It changes several times as
many codes, which is better at 2 bits, no better at 3 and 4, and worse at 3 behind two Hessians (benchmarks/LOG.md).

Start.  u begins half way between the code that the solve chose and the place w / s + zero_point of the weight it was
given (the *offset*, cut to the code's cell).  Codes that GPTQ chose away from the nearest level compensate one another;
if u began at the edge of their cells they would all fall back at the first step, and from the middle of the cells too
few codes move (measured in benchmarks/LOG.md).

Shapes: E experts, O out features, I in features, G groups per row, S in features per group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeq.quant.grid import broadcast_zero
from moeq.quant.spec import QuantizedWeight, SuperScales
from moeq.quant.two_level import add_offset, divisor, group_offset, group_scale, stack_supers

NEAR_EDGE = 0.49  # just inside the cell of a code, which ends half a level from it
START = 0.5
HARDENING = 3  # power of the share of steps that are left, with which softness falls


@dataclass(frozen=True)
class LearnedSpec:
    """Settings of learned rounding.

    Attributes:
        num_steps: Steps of Adam on each block, one batch each; step sizes fall linearly to zero.
        level_rate: Step size of the latent codes, in levels.
        scale_rate: Step size of the logarithms of the scales.
        softness: How soft the choice of levels is at the first step, in levels; it falls to nothing.  At 2 bits 0.33,
            with a level_rate of 0.03, is better than 0.
        seed: Order of the batches.
    """

    num_steps: int = 100
    level_rate: float = 0.01
    scale_rate: float = 1e-3
    softness: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps ({self.num_steps}) must be at least 1; the usual value is 100 to 400")
        for name, rate in (("level_rate", self.level_rate), ("scale_rate", self.scale_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} ({rate}) must lie between 0 and 1; usual values are 0.01 and 0.001")
        if not 0.0 <= self.softness <= 1.0:
            raise ValueError(
                f"softness ({self.softness}) must lie between 0 and 1; usual values are 0, and 0.33 at 2 bits"
            )


@dataclass(frozen=True)
class Latent:
    """Quantized weights of one grid, stacked over experts, as something that gradients can move.

    Attributes:
        level_EOGS: float32 leaf, u.
        log_EOG: float32 leaf, v; of super-blocks on a two-level grid.
        scale_EOG: Scales as they are stored, s.
        zero_point_EOG: As stored, or None for a symmetric grid.
        bits: Bits per code.
        super_scales: Of a two-level grid; else None.
    """

    level_EOGS: Tensor
    log_EOG: Tensor
    scale_EOG: Tensor
    zero_point_EOG: Tensor | None
    bits: int
    super_scales: SuperScales | None = None


# Weights [E, O, I] of a latent, differentiable.
WeightOf = Callable[[Latent], Tensor]
Backward = Callable[[int, WeightOf], None]


def level_offset(weight: QuantizedWeight, solved_OI: Tensor) -> Tensor:
    """Where the weight that was solved lies in the cell of its code, in levels: float16 [O, I], -0.49 to 0.49.

    A later change of scale of a whole row does not change it.
    """
    supers, scale_OG = weight.super_scales, weight.scale_OG.float()
    if supers is not None:
        solved_OI = add_offset(solved_OI, weight.zero_point_OG, supers)
        scale_OG = group_scale(weight.scale_OG, supers)
    zero_point = broadcast_zero(weight.zero_point_OG, weight.bits, supers)
    exact_OGS = solved_OI.view(*scale_OG.shape, -1) / divisor(scale_OG).unsqueeze(-1) + zero_point
    offset_OI = exact_OGS.view(solved_OI.shape) - weight.codes_OI.float()
    return offset_OI.clamp_(-NEAR_EDGE, NEAR_EDGE).half()


def open_latent(weights: Sequence[QuantizedWeight], offset_EOI: Tensor) -> Latent:
    """The starting point for quantized weights that share a grid.

    Args:
        weights: One per expert, all with the same bits and groups.
        offset_EOI: ``level_offset`` of each; latents are on its device.
    """
    device = offset_EOI.device
    scale_EOG = torch.stack([weight.scale_OG for weight in weights]).to(device)
    zero_points = [weight.zero_point_OG for weight in weights if weight.zero_point_OG is not None]
    supers = [weight.super_scales for weight in weights if weight.super_scales is not None]
    of_stack = stack_supers(supers).each(lambda tensor: tensor.to(device)) if supers else None
    moved = scale_EOG if of_stack is None else of_stack.scale_OB
    level_EOI = torch.stack([weight.codes_OI for weight in weights]).to(device).float()
    level_EOI.add_(offset_EOI.float(), alpha=START)
    return Latent(
        level_EOGS=level_EOI.view(*scale_EOG.shape, -1).requires_grad_(),
        log_EOG=torch.zeros_like(moved, dtype=torch.float32).requires_grad_(),
        scale_EOG=scale_EOG,
        zero_point_EOG=torch.stack(zero_points).to(device) if zero_points else None,
        bits=weights[0].bits,
        super_scales=of_stack,
    )


def latent_weight(latent: Latent, softness: float = 0.0) -> Tensor:
    """The weights [E, O, I] that the latents stand for, float32; differentiable.

    Args:
        latent: Codes and scales.
        softness: Of the choice of levels; 0 gives the weights of the codes.
    """
    if softness:
        level_EOGS = _SoftLevel.apply(latent.level_EOGS, softness, 2**latent.bits - 1)
    else:
        level_EOGS = _PassThrough.apply(latent.level_EOGS, torch.round).clamp(0, 2**latent.bits - 1)
    supers = latent.super_scales
    stored = latent.scale_EOG if supers is None else supers.scale_OB
    scale_EOG = _PassThrough.apply(stored.float() * latent.log_EOG.exp(), _stored_as(stored.dtype))
    if supers is not None:
        scale_EOG = group_scale(latent.scale_EOG, replace(supers, scale_OB=scale_EOG))
    zero_point = broadcast_zero(latent.zero_point_EOG, latent.bits, supers)
    weight_EOGS = (level_EOGS - zero_point) * scale_EOG.unsqueeze(-1)
    offset_EOG = None if supers is None else group_offset(latent.zero_point_EOG, supers)
    return (weight_EOGS if offset_EOG is None else weight_EOGS - offset_EOG.unsqueeze(-1)).flatten(2)


def close_latent(latent: Latent, weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """The weights that the latents were opened from, with their new codes and scales, on the latents' device."""
    codes_EOI = latent.level_EOGS.detach().round().clamp(0, 2**latent.bits - 1).to(torch.uint8).flatten(2)
    stored = latent.scale_EOG if latent.super_scales is None else latent.super_scales.scale_OB
    moved_EOG = (stored.float() * latent.log_EOG.detach().exp()).to(stored.dtype)
    new = zip(weights, codes_EOI, moved_EOG, strict=True)
    return [_moved(replace(weight, codes_OI=codes_OI), scale) for weight, codes_OI, scale in new]


def _moved(weight: QuantizedWeight, scale: Tensor) -> QuantizedWeight:
    """A weight with other scales: those that are float, of groups or of super-blocks."""
    if weight.super_scales is None:
        return replace(weight, scale_OG=scale)
    return replace(weight, super_scales=replace(weight.super_scales, scale_OB=scale))


def learn(
    latents: Sequence[Latent],
    backward: Backward,
    num_batches: int,
    spec: LearnedSpec,
) -> None:
    """Move the latents, in place, by Adam.

    Args:
        latents: What is learned.
        backward: Adds the gradients of the error on one batch, by its number, to the latents' ``grad``; given the
            weights that latents stand for.
        num_batches: Batches are drawn in a random order, all of them before any is repeated.
        spec: Steps and rates.
    """
    groups = [
        {"params": [latent.level_EOGS for latent in latents], "lr": spec.level_rate},
        {"params": [latent.log_EOG for latent in latents], "lr": spec.scale_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / spec.num_steps)
    generator = torch.Generator().manual_seed(spec.seed)
    order: list[int] = []
    for step in range(spec.num_steps):
        order = order or torch.randperm(num_batches, generator=generator).tolist()
        optimizer.zero_grad()
        softness = spec.softness * (1.0 - step / spec.num_steps) ** HARDENING
        backward(order.pop(), partial(latent_weight, softness=softness))
        optimizer.step()
        schedule.step()
        for latent in latents:  # a level far outside of the grid would take many steps to come back
            latent.level_EOGS.data.clamp_(-NEAR_EDGE, 2**latent.bits - 1 + NEAR_EDGE)


def block_error(output_BTD: Tensor, original_BTD: Tensor, keep_BT: Tensor) -> Tensor:
    """Mean over tokens of ``|output - original|^2 / |original|^2``: the next block's norm divides by the length, too.

    The outputs of routed experts are in it as the block adds them up, that is times their affinities.

    Args:
        output_BTD: What the quantized block returns.
        original_BTD: What the original returned.
        keep_BT: bool; which tokens count.
    """
    original_ND = original_BTD[keep_BT].float()
    energy_N = original_ND.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output_BTD[keep_BT].float() - original_ND).square().sum(-1) / energy_N).mean()


class _PassThrough(torch.autograd.Function):
    """A function whose gradient is taken as one."""

    @staticmethod
    def forward(ctx: object, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SoftLevel(torch.autograd.Function):
    """Mean of the code nearest to each latent and its two neighbours, by their distances; see the module."""

    @staticmethod
    def forward(ctx: Any, level_EOGS: Tensor, softness: float, highest: int) -> Tensor:
        nearest_EOGS = level_EOGS.round().clamp_(0, highest)
        apart_EOGS = level_EOGS - nearest_EOGS
        # Weights beside that of the nearest code, which is 1: at most 1 themselves, so nothing overflows.
        above_EOGS = (apart_EOGS - 0.5).div_(softness).clamp_(max=0).exp_().masked_fill_(nearest_EOGS == highest, 0)
        below_EOGS = apart_EOGS.add_(0.5).div_(-softness).clamp_(max=0).exp_().masked_fill_(nearest_EOGS == 0, 0)
        total_EOGS = (above_EOGS + below_EOGS).add_(1)
        mean_EOGS = (above_EOGS - below_EOGS).div_(total_EOGS)
        variance_EOGS = above_EOGS.add_(below_EOGS).div_(total_EOGS).sub_(mean_EOGS.square())
        ctx.save_for_backward(variance_EOGS.div_(softness))
        return nearest_EOGS.add_(mean_EOGS)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope_EOGS,) = ctx.saved_tensors
        return gradients[0] * slope_EOGS, None, None


def _stored_as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()
