"""GSQ's choice of levels, as the benchmarks have it."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.peers.gsq import GumbelSpec, chosen_weight, gumbel_like, learn_by_gumbel, open_choice
from moeq.quant.grid import choose_qparams, quantize
from moeq.quant.learned import Latent, WeightOf, latent_weight, level_offset, open_latent
from moeq.quant.spec import GridSpec, QuantizedWeight

GRID = GridSpec(2, 8)
SPEC = GumbelSpec(num_steps=60, logit_rate=2e-3)


def opened() -> tuple[Tensor, Latent]:
    weight_EOI = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    found = choose_qparams(weight_EOI, GRID, torch.float32)
    codes_EOI = quantize(weight_EOI, found, GRID)
    assert found.zero_point_EOG is not None
    given = [
        QuantizedWeight(codes_EOI[e], found.scale_EOG[e], found.zero_point_EOG[e], GRID.bits, GRID.group_size)
        for e in range(len(weight_EOI))
    ]
    offsets = [level_offset(*pair) for pair in zip(given, weight_EOI, strict=True)]
    return weight_EOI, open_latent(given, torch.stack(offsets))


def test_a_weight_is_the_mean_of_its_levels_and_begins_nearest_to_where_it_was() -> None:
    _, latent = opened()
    choice = open_choice(latent, SPEC)
    found_EOI = chosen_weight(latent, choice, 100 * choice.logit_KEOGS)
    num_experts, num_rows, num_groups, size = latent.level_EOGS.shape
    assert latent.zero_point_EOG is not None
    for e, o, g, s in product(range(num_experts), range(num_rows), range(num_groups), range(size)):
        u = latent.level_EOGS[e, o, g, s].item()
        around = [round(u) + step for step in (-1, 0, 1) if 0 <= round(u) + step < 4]
        weights = [math.exp(100 * -0.5 * SPEC.spread * SPEC.strength * (u - level) ** 2) for level in around]
        mean = sum(w * level for w, level in zip(weights, around, strict=True)) / sum(weights)
        real = (mean - latent.zero_point_EOG[e, o, g].item()) * latent.scale_EOG[e, o, g].item()
        assert found_EOI[e, o, g * size + s].item() == pytest.approx(real, abs=1e-5)


@pytest.mark.parametrize("noisy", [True, False])
def test_learning_lowers_an_error_and_ends_on_levels_of_the_grid(noisy: bool) -> None:
    weight_EOI, latent = opened()
    generator = torch.Generator().manual_seed(1)  # few directions count
    x_TI = torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator)

    def error(weight_of: WeightOf) -> Tensor:
        return (x_TI @ (weight_of(latent) - weight_EOI).mT).square().mean()

    before = float(error(latent_weight).detach())
    spec = GumbelSpec(num_steps=60, logit_rate=2e-3, noisy=noisy)
    learn_by_gumbel([latent], lambda _, weight_of: error(weight_of).backward(), 1, spec)
    assert float(error(latent_weight).detach()) < 0.7 * before
    level_EOGS = latent.level_EOGS.detach()
    assert torch.equal(level_EOGS, level_EOGS.round().clamp(0, 3))


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_like(torch.empty(100_000), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
