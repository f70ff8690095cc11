import math

import torch
from torch import Tensor

from moeq.decoding.gumbel import Children, draw_children


def draw(log_prob_V: Tensor, rows: int, num: int, generator: torch.Generator, location: float = 0.0) -> Children:
    location_R = torch.full((rows,), location, dtype=torch.float64)
    uniform = torch.rand(rows, num, 2, generator=generator, dtype=torch.float64)
    return draw_children(log_prob_V.expand(rows, -1), location_R, torch.zeros(rows, dtype=torch.float64), uniform)


def reference_children(
    log_prob_V: Tensor, location: float, maximum: float, num: int, generator: torch.Generator
) -> "torch.return_types.topk":
    """Kool et al. 2019, section 4.1: a Gumbel per token, then all of them conditioned on their maximum."""
    gumbel = -torch.log(-torch.log(torch.rand(log_prob_V.shape, generator=generator, dtype=torch.float64)))
    perturbed = location + log_prob_V.double() + gumbel
    conditioned = -torch.log(math.exp(-maximum) - torch.exp(-perturbed.max()) + torch.exp(-perturbed))
    return conditioned.topk(num)


def test_children_have_the_distribution_of_gumbel_top_w(generator: torch.Generator) -> None:
    """Order of the tokens, and mean of each perturbed log-probability, against one Gumbel per token."""
    log_prob_V = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    rows, location = 20000, -1.3
    children = draw(log_prob_V, rows, 3, generator, location)
    expected = [reference_children(log_prob_V, location, 0.0, 3, generator) for _ in range(rows)]
    code = torch.tensor([16, 4, 1])
    ours = (children.token_RC * code).sum(1).bincount(minlength=64) / rows
    theirs = (torch.stack([e.indices for e in expected]) * code).sum(1).bincount(minlength=64) / rows
    assert (ours - theirs).abs().max() < 0.015
    assert torch.allclose(children.perturbed_RC.mean(0), torch.stack([e.values for e in expected]).mean(0), atol=0.05)


def test_children_are_distinct_and_ordered_even_behind_a_certain_token(generator: torch.Generator) -> None:
    logits_V = torch.zeros(200)
    logits_V[77] = 300.0  # the others underflow in float32
    children = draw(logits_V.log_softmax(-1), 500, 6, generator)
    assert (children.token_RC[:, 0] == 77).all()
    assert all(len(set(row)) == 6 and max(row) < 200 for row in children.token_RC.tolist())
    assert (children.perturbed_RC.diff(dim=1) <= 0).all()
    assert torch.isfinite(children.perturbed_RC).all()


def test_impossible_tokens_are_drawn_last(generator: torch.Generator) -> None:
    log_prob_V = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    children = draw(log_prob_V, 300, 3, generator)
    assert (children.token_RC[:, :2] < 2).all()
    assert (children.token_RC[:, 2] >= 2).all()


def test_extreme_random_numbers_stay_inside_the_vocabulary() -> None:
    log_prob_RV = torch.full((2, 70), -math.log(70))
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).view(2, 1, 1).expand(2, 2, 2)
    zeros = torch.zeros(2, dtype=torch.float64)
    children = draw_children(log_prob_RV, zeros, zeros, uniform)
    assert children.token_RC.tolist() == [[0, 1], [69, 68]]
    assert torch.isfinite(children.perturbed_RC).all()
