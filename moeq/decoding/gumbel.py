"""Gumbel sampling for stochastic beam search: children drawn without replacement, each with its perturbed score G.

A branch has log-probability ``phi`` and a perturbed one ``G`` (a Gumbel variable with location ``phi``).  Its children
have G_v with location phi + log P(v), and their maximum is G (Kool, van Hoof and Welling 2019, section 4.1).  Only the
w largest G_v are needed, so instead of one Gumbel per vocabulary entry they are built from the top (A* sampling,
Maddison, Tarlow and Minka 2014): child j is drawn from what is left of P, and

    G_1 = G        G_j = Gumbel(phi + log(mass left)) truncated at G_(j-1)
                       = location - log( exp(location - G_(j-1)) + Exponential(1) )

which takes 2 random numbers per child.  A child is found by its cumulative probability in two levels, first among
sections of ``SECTION`` tokens and then inside one, so that each further child costs far less than a pass over V.

Legend: R branches, C children of each, V vocabulary, S sections, K tokens per section.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SECTION = 64
# Keeps every token possible, so that there are always enough of them to draw; far below what could ever be noticed.
LEAST_PROBABILITY = 1e-37


@dataclass(frozen=True)
class Children:
    """Children of R branches in decreasing order of their perturbed log-probability.

    Attributes:
        token_RC: int64, distinct within a branch.
        log_prob_RC: float64 log P of the child given its parent.
        perturbed_RC: float64 G; the first is the parent's own.
    """

    token_RC: Tensor
    log_prob_RC: Tensor
    perturbed_RC: Tensor


def tempered(log_prob_RV: Tensor, temperature: float, top_p: float, least: int) -> Tensor:
    """float32 log P at a temperature, of the likeliest tokens that hold ``top_p`` of it together; others get -inf.

    Args:
        log_prob_RV: float32, normalised.
        temperature: 1 leaves P as it is, less makes it sharper.
        top_p: The smallest set of likeliest tokens that reaches this probability stays; 1 keeps all.
        least: Tokens that stay at least, so that as many distinct children can be drawn.
    """
    if temperature != 1:
        log_prob_RV = (log_prob_RV / temperature).log_softmax(-1)
    if top_p == 1:
        return log_prob_RV
    ordered = log_prob_RV.sort(-1, descending=True)
    probability_RV = ordered.values.exp()
    beyond_RV = probability_RV.cumsum(-1) - probability_RV >= top_p
    beyond_RV[:, :least] = False
    log_prob_RV = log_prob_RV.masked_fill(
        torch.zeros_like(beyond_RV).scatter(-1, ordered.indices, beyond_RV), -torch.inf
    )
    return log_prob_RV.log_softmax(-1)


def draw_children(log_prob_RV: Tensor, location_R: Tensor, perturbed_R: Tensor, uniform_RC2: Tensor) -> Children:
    """Draw C children of each branch.

    Args:
        log_prob_RV: float32 log P of the next token, normalised.
        location_R: float64 phi.
        perturbed_R: float64 G.
        uniform_RC2: float64 in [0, 1): the random numbers, for the token and for the Gumbel of each child.
    """
    num_tokens = log_prob_RV.shape[-1]
    left_RV = log_prob_RV.exp().clamp_(min=LEAST_PROBABILITY)
    left_RSK = F.pad(left_RV, (0, -num_tokens % SECTION)).unflatten(-1, (-1, SECTION))
    section_RS = left_RSK.sum(-1).double()
    row_R = torch.arange(len(log_prob_RV), device=log_prob_RV.device)
    tokens, log_probs, perturbed = [], [], [perturbed_R]
    for child in range(uniform_RC2.shape[1]):
        mass_RS = section_RS.cumsum(-1)
        point_R = uniform_RC2[:, child, 0] * mass_RS[:, -1]
        section_R = _first_above(mass_RS, point_R)
        inside_RK = left_RSK[row_R, section_R].double().cumsum(-1)
        token_R = _first_above(inside_RK, point_R - (mass_RS[row_R, section_R] - section_RS[row_R, section_R]))
        if child:
            location = location_R + mass_RS[:, -1].log()
            log_exponential_R = torch.log(-torch.log1p(-uniform_RC2[:, child, 1]))
            perturbed.append(location - torch.logaddexp(location - perturbed[-1], log_exponential_R))
        tokens.append(section_R * SECTION + token_R)
        log_probs.append(left_RSK[row_R, section_R, token_R].double().log())
        # What is left of a section is summed anew: a difference would lose the tail behind a token with P near 1.
        left_RSK[row_R, section_R, token_R] = 0.0
        section_RS[row_R, section_R] = left_RSK[row_R, section_R].sum(-1).double()
    return Children(torch.stack(tokens, -1), torch.stack(log_probs, -1), torch.stack(perturbed, -1))


def _first_above(cumulative_RX: Tensor, point_R: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the point: never one without mass, never past the end."""
    total_R = cumulative_RX[:, -1]
    below_total_R = torch.nextafter(total_R, torch.zeros_like(total_R))
    point_R = torch.minimum(point_R.clamp(min=0.0), below_total_R)
    return torch.searchsorted(cumulative_RX, point_R.unsqueeze(-1), right=True).squeeze(-1)
