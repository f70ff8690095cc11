"""GSQ's choice of levels as an arm beside learned rounding: ours, with schedules as its authors publish them.

Dadgarnia et al., 2026, arXiv 2604.18556.  Every weight is a mean of levels whose probabilities are learned,

    real = (sum_k p_k c_k - zero_point) * s exp(v),    p = softmax((kappa l + g) / T),

with logits l, standard Gumbel noise g, a temperature T that falls and a sharpness kappa that rises; in the end a weight
gets its likeliest level.  Logits begin at ``spread * strength`` times minus half the squared distance of the solved
weight from each level.  What differs from the paper: the levels are the code that was solved and its two
neighbours (all four at 2 bits there), the start is that of ``moeq.quant.learned``, the error is that of a block as
learned rounding has it, and the step size suits a hundred steps instead of thousands.

Shapes: K levels of a weight, E experts, O out features, G groups per row, S in features per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from callbacks.learned_rounding import LearnedRounding
from moeq.quant.grid import broadcast_zero
from moeq.quant.learned import Backward, Latent

NEVER = -1e9  # logit of a level that the grid lacks


@dataclass(frozen=True)
class GumbelSpec:
    """Settings; pairs are values at the first step and at the last, linear between them.

    Attributes:
        num_steps: Steps of Adam, one batch each; step sizes fall linearly to zero.
        logit_rate: Step size of the logits.
        scale_rate: Step size of the logarithms of the scales.
        spread: Scale of the logits at the start.
        strength: How much likelier nearer levels are at the start.
        temperature: T.
        sharpness: kappa.
        noisy: Whether g is drawn; else it is 0.
        seed: Of the order of the batches, and of the noise.
    """

    num_steps: int = 100
    logit_rate: float = 1e-3
    scale_rate: float = 1e-3
    spread: float = 0.01
    strength: float = 6.0
    temperature: tuple[float, float] = (2.0, 0.05)
    sharpness: tuple[float, float] = (100.0, 500.0)
    noisy: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """Levels around a code and their logits, both [K, E, O, G, S]; the logits are a leaf."""

    level_KEOGS: Tensor
    logit_KEOGS: Tensor


def open_choice(latent: Latent, spec: GumbelSpec) -> Choice:
    """The start: three levels around the code of each weight, preferred by their distance from its latent."""
    highest = 2**latent.bits - 1
    code_EOGS = latent.level_EOGS.detach().round().clamp(0, highest)
    level_KEOGS = torch.stack([code_EOGS - 1, code_EOGS, code_EOGS + 1])
    logit_KEOGS = -0.5 * spec.spread * spec.strength * (latent.level_EOGS.detach() - level_KEOGS).square()
    outside_KEOGS = (level_KEOGS < 0) | (level_KEOGS > highest)
    return Choice(level_KEOGS, logit_KEOGS.masked_fill_(outside_KEOGS, NEVER).requires_grad_())


def chosen_weight(latent: Latent, choice: Choice, logit_KEOGS: Tensor) -> Tensor:
    """Weights [E, O, I] of levels with these logits; differentiable.  For grids with one level of scales."""
    level_EOGS = (logit_KEOGS.softmax(0) * choice.level_KEOGS).sum(0)
    zero_point = broadcast_zero(latent.zero_point_EOG, latent.bits, None)
    scale_EOG = latent.scale_EOG.float() * latent.log_EOG.exp()
    return ((level_EOGS - zero_point) * scale_EOG.unsqueeze(-1)).flatten(2)


def learn_by_gumbel(latents: Sequence[Latent], backward: Backward, num_batches: int, spec: GumbelSpec) -> None:
    """As ``moeq.quant.learned.learn``: in the end each latent is the likeliest level.  On one rank."""
    choices = {id(latent): open_choice(latent, spec) for latent in latents}
    groups = [
        {"params": [choice.logit_KEOGS for choice in choices.values()], "lr": spec.logit_rate},
        {"params": [latent.log_EOG for latent in latents], "lr": spec.scale_rate},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / spec.num_steps)
    noise, generator = (torch.Generator().manual_seed(spec.seed) for _ in range(2))
    order: list[int] = []
    for step in range(spec.num_steps):
        order = order or torch.randperm(num_batches, generator=generator).tolist()
        share = step / max(spec.num_steps - 1, 1)
        temperature, sharpness = (a + (b - a) * share for a, b in (spec.temperature, spec.sharpness))

        def weight_of(latent: Latent, temperature: float = temperature, sharpness: float = sharpness) -> Tensor:
            choice = choices[id(latent)]
            gumbel = gumbel_like(choice.logit_KEOGS, noise) if spec.noisy else 0.0
            return chosen_weight(latent, choice, (sharpness * choice.logit_KEOGS + gumbel) / temperature)

        optimizer.zero_grad()
        backward(order.pop(), weight_of)
        optimizer.step()
        schedule.step()
    for latent in latents:
        choice = choices[id(latent)]
        likeliest_1EOGS = choice.logit_KEOGS.detach().argmax(0, keepdim=True)
        latent.level_EOGS.data.copy_(choice.level_KEOGS.gather(0, likeliest_1EOGS)[0])


def gumbel_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.rand(tensor.shape, generator=generator).clamp_(1e-10, 1 - 1e-7).log_().neg_().log_()


class GumbelRounding(LearnedRounding):
    """Learned rounding whose levels are chosen as in GSQ; on one rank and on grids with one level of scales.

    Args:
        spec: Steps and schedules.
    """

    affects_weights = False

    def __init__(self, spec: GumbelSpec | None = None) -> None:
        super().__init__()
        self.learner = partial(learn_by_gumbel, spec=spec or GumbelSpec())
