from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeq.quant.grid import choose_qparams, dequantize_weight, quantize
from moeq.quant.learned import (
    Latent,
    LearnedSpec,
    WeightOf,
    block_error,
    close_latent,
    latent_weight,
    learn,
    level_offset,
    open_latent,
)
from moeq.quant.spec import GridSpec, QuantizedWeight


def rounded(weight_EOI: Tensor, grid: GridSpec, dtype: torch.dtype = torch.bfloat16) -> list[QuantizedWeight]:
    qparams = choose_qparams(weight_EOI, grid, dtype)
    codes_EOI = quantize(weight_EOI, qparams, grid)
    return [
        QuantizedWeight(
            codes_EOI[e], qparams.scale_EOG[e],
            None if qparams.zero_point_EOG is None else qparams.zero_point_EOG[e], grid.bits, grid.group_size,
        )
        for e in range(len(weight_EOI))
    ]  # fmt: skip


def opened(weight_EOI: Tensor, grid: GridSpec, dtype: torch.dtype = torch.bfloat16) -> Latent:
    given = rounded(weight_EOI, grid, dtype)
    return open_latent(given, torch.stack([level_offset(*pair) for pair in zip(given, weight_EOI, strict=True)]))


def weights(seed: int = 0) -> Tensor:
    return torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(seed))


GRIDS = [
    GridSpec(3, 16, symmetric=False), GridSpec(2, None, symmetric=False), GridSpec(4, 8, symmetric=True),
    GridSpec(2, 8, symmetric=True, kind="full_range"), GridSpec(1, 8, symmetric=True),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
def test_the_start_is_the_solution_it_was_opened_from(grid: GridSpec) -> None:
    given = rounded(weights(), grid)
    latent = opened(weights(), grid)
    for expert, weight_OI in zip(given, latent_weight(latent), strict=True):
        assert torch.equal(dequantize_weight(expert, torch.float32), weight_OI)
    for before, after in zip(given, close_latent(latent, given), strict=True):
        assert torch.equal(before.codes_OI, after.codes_OI)
        assert torch.equal(before.scale_OG, after.scale_OG)
        assert (before.bits, before.group_size) == (after.bits, after.group_size)


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_learned_is_what_is_stored(grid: GridSpec) -> None:
    given = rounded(weights(), grid)
    latent = opened(weights(), grid)
    generator = torch.Generator().manual_seed(1)
    latent.level_EOGS.data.add_(torch.randn(latent.level_EOGS.shape, generator=generator))
    latent.log_EOG.data.add_(0.2 * torch.randn(latent.log_EOG.shape, generator=generator))
    closed = close_latent(latent, given)
    for weight_OI, stored, before in zip(latent_weight(latent), closed, given, strict=True):
        assert torch.equal(weight_OI, dequantize_weight(stored, torch.float32))
        assert int(stored.codes_OI.max()) < 2**grid.bits
        assert stored.scale_OG.dtype == torch.bfloat16
        assert torch.equal(stored.scale_OG.sign(), before.scale_OG.sign())
    assert any(bool((weight.scale_OG < 0).any()) for weight in given) == (grid.kind == "full_range")


@pytest.mark.parametrize("grid", GRIDS)
def test_the_offset_tells_where_in_its_cell_a_weight_lies_whatever_the_scale_of_its_row(grid: GridSpec) -> None:
    given = rounded(weights(), grid, torch.float32)[0]
    offset_OI = level_offset(given, weights()[0])
    exact_OI = dequantize_weight(replace(given, codes_OI=given.codes_OI.float() + offset_OI), torch.float32)
    inside_OI = offset_OI.abs() < 0.48
    assert inside_OI.float().mean() > 0.5
    torch.testing.assert_close(exact_OI[inside_OI], weights()[0][inside_OI], rtol=0, atol=2e-3)
    rescaled = replace(given, scale_OG=given.scale_OG / 4)
    assert torch.equal(level_offset(rescaled, weights()[0] / 4), offset_OI)


def test_the_block_error_is_relative_and_leaves_padding_out() -> None:
    original_BTD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    keep_BT = torch.tensor([[True, True, False], [True, False, False]])
    output_BTD = original_BTD * torch.tensor([1.1, 1.0, 9.0]).view(1, 3, 1)
    assert float(block_error(output_BTD, original_BTD, keep_BT)) == pytest.approx(2 * 0.1**2 / 3, rel=1e-4)
    assert float(block_error(100 * output_BTD, 100 * original_BTD, keep_BT)) == pytest.approx(2 * 0.1**2 / 3, rel=1e-4)


def test_gradients_are_those_of_the_grid_without_rounding() -> None:
    grid = GridSpec(8, 16)  # all levels inside, so nothing is clamped
    latent = opened(weights(), grid, torch.float32)
    latent_weight(latent).square().sum().backward()
    level_EOGS = latent.level_EOGS.detach().round()
    assert latent.zero_point_EOG is not None
    scale_EOG1, zero_EOG1 = latent.scale_EOG.unsqueeze(-1), latent.zero_point_EOG.unsqueeze(-1)
    real_EOGS = (level_EOGS - zero_EOG1) * scale_EOG1
    torch.testing.assert_close(latent.level_EOGS.grad, 2 * real_EOGS * scale_EOG1)
    torch.testing.assert_close(latent.log_EOG.grad, (2 * real_EOGS.square()).sum(-1))


def reference_soft_level(u: Tensor, softness: float, highest: int) -> Tensor:
    """Mean of the codes within the grid that are at most one from the nearest, level by level; differentiable."""
    means = []
    for level in u.flatten():
        nearest = min(max(round(level.item()), 0), highest)
        codes = [code for code in (nearest - 1, nearest, nearest + 1) if 0 <= code <= highest]
        preference = torch.stack([-((level - code) ** 2) / (2 * softness) for code in codes])
        means.append((preference.softmax(0) * torch.tensor(codes, dtype=u.dtype)).sum())
    return torch.stack(means).view(u.shape)


@pytest.mark.parametrize("softness", [0.4, 0.05, 1e-3])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_soft_level_is_the_mean_of_the_codes_around_it_and_so_is_its_gradient(
    grid: GridSpec, softness: float
) -> None:
    latent = opened(weights()[:1], grid, torch.float32)
    generator = torch.Generator().manual_seed(2)
    latent.level_EOGS.data.add_(0.3 * torch.randn(latent.level_EOGS.shape, generator=generator))
    latent.level_EOGS.data.clamp_(-0.49, 2**grid.bits - 0.51)
    u = latent.level_EOGS.detach().double().requires_grad_()
    level_EOGS = reference_soft_level(u, softness, 2**grid.bits - 1)
    middle = 0.5 if grid.bits == 1 else 2 ** (grid.bits - 1)
    offset = middle if latent.zero_point_EOG is None else latent.zero_point_EOG.unsqueeze(-1)
    wanted_EOI = ((level_EOGS - offset) * latent.scale_EOG.unsqueeze(-1)).flatten(2)
    pull_EOI = torch.randn(wanted_EOI.shape, generator=generator)
    (wanted_EOI * pull_EOI).sum().backward()
    found_EOI = latent_weight(latent, softness)
    torch.testing.assert_close(found_EOI, wanted_EOI.float(), rtol=1e-4, atol=1e-5)
    (found_EOI * pull_EOI).sum().backward()
    assert latent.level_EOGS.grad is not None
    assert u.grad is not None
    torch.testing.assert_close(latent.level_EOGS.grad, u.grad.float(), rtol=1e-3, atol=1e-4 / softness)


def test_what_is_soft_ends_on_the_codes() -> None:
    latent = opened(weights(), GRIDS[0])
    torch.testing.assert_close(latent_weight(latent, 1e-6), latent_weight(latent))
    apart = [(latent_weight(latent, softness) - latent_weight(latent)).norm() for softness in (0.4, 0.1, 0.02)]
    assert apart[0] > apart[1] > apart[2] > 0


def test_softness_falls_with_the_cube_of_the_steps_that_are_left() -> None:
    latent = opened(weights(), GRIDS[0])
    seen: list[Tensor] = []

    def backward(_: int, weight_of: WeightOf) -> None:
        seen.append(weight_of(latent).detach())
        latent_weight(latent).sum().backward()

    learn([latent], backward, 2, LearnedSpec(num_steps=4, level_rate=0.0, scale_rate=0.0, softness=0.4))
    for softness, found_EOI in zip((0.4, 0.16875, 0.05, 0.00625), seen, strict=True):
        torch.testing.assert_close(found_EOI, latent_weight(latent, softness))


def learned_error(spec: LearnedSpec) -> tuple[float, float]:
    """Output error of two stacked linears in a row, before and after learning."""
    generator = torch.Generator().manual_seed(0)
    first_EOI, second_EOI = (0.3 * torch.randn(2, 16, 16, generator=generator) for _ in range(2))
    x_ETI = torch.randn(2, 64, 16, generator=generator)
    wanted_ETO = (x_ETI @ first_EOI.mT).relu() @ second_EOI.mT
    grid = GridSpec(3, 8)
    latents = [opened(w, grid) for w in (first_EOI, second_EOI)]

    def error(part: slice = slice(None), weight_of: WeightOf = latent_weight) -> Tensor:
        first, second = map(weight_of, latents)
        return ((x_ETI[:, part] @ first.mT).relu() @ second.mT - wanted_ETO[:, part]).square().mean()

    before = float(error().detach())
    learn(latents, lambda batch, weight_of: error(slice(16 * batch, 16 * batch + 16), weight_of).backward(), 4, spec)
    return before, float(error().detach())


def test_learning_lowers_an_error_that_spans_two_linears() -> None:
    before, after = learned_error(LearnedSpec(num_steps=60, level_rate=0.02, scale_rate=0.002))
    assert after < 0.9 * before


def test_each_rate_alone_lowers_it_and_none_leaves_it() -> None:
    for spec in (LearnedSpec(60, 0.02, 0.0), LearnedSpec(60, 0.03, 0.0, softness=0.33), LearnedSpec(60, 0.0, 0.002)):
        before, after = learned_error(spec)
        assert after < before
    before, after = learned_error(LearnedSpec(20, 0.0, 0.0))
    assert after == before


def test_every_batch_is_seen_before_any_is_seen_again() -> None:
    latent = opened(weights(), GRIDS[0])
    seen: list[int] = []

    def backward(batch: int, _: WeightOf) -> None:
        seen.append(batch)
        latent_weight(latent).sum().backward()

    learn([latent], backward, 5, LearnedSpec(num_steps=12))
    assert sorted(seen[:5]) == sorted(seen[5:10]) == [0, 1, 2, 3, 4]
    assert len(seen) == 12


def test_levels_stay_near_the_grid() -> None:
    latent = opened(weights(), GRIDS[1])
    learn([latent], lambda *_: (1e6 * latent_weight(latent)).sum().backward(), 1, LearnedSpec(50, 0.9, 0.0))
    assert float(latent.level_EOGS.detach().min()) >= -0.5
    assert isinstance(latent, Latent)


@pytest.mark.parametrize(
    ("name", "value"), [("num_steps", 0), ("level_rate", -1.0), ("scale_rate", 1.0), ("softness", 1.5)]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LearnedSpec(**{name: value})
