"""Hessian sums against an explicit loop over tokens."""

import pytest
import torch
from torch import Tensor

from moeq.quant.hessian import HessianState, accumulate, effective_samples, empty_state, mean_hessian


def reference_sum(x_TI: Tensor, affinity_T: Tensor, power: float) -> Tensor:
    total_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], dtype=torch.float64)
    for x_I, affinity in zip(x_TI.double(), affinity_T.double(), strict=True):
        total_II += affinity**power * torch.outer(x_I, x_I)
    return total_II


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[int, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(0, 7), (2, 5), (0, 3), (2, 0)]
    return [
        (expert, torch.randn(size, 6, generator=generator).to(dtype), torch.rand(size, generator=generator).to(dtype))
        for expert, size in sizes
    ]


def filled(power: float, dtype: torch.dtype = torch.float32) -> HessianState:
    state = empty_state(3, 6, "cpu")
    for expert_idx, x_TI, affinity_T in batches(dtype):
        accumulate(state, expert_idx, x_TI, affinity_T, power)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_affinity_weighted_sums_equal_a_loop_over_tokens(power: int, dtype: torch.dtype) -> None:
    state = filled(power, dtype)
    for expert in range(3):
        seen = [(x_TI, affinity_T) for expert_idx, x_TI, affinity_T in batches(dtype) if expert_idx == expert]
        expected_II = sum((reference_sum(*pair, power) for pair in seen), torch.zeros(6, 6, dtype=torch.float64))
        torch.testing.assert_close(state.sum_EII[expert].double(), expected_II, rtol=1e-5, atol=1e-5)
        affinities = torch.cat([torch.zeros(0), *(affinity_T.float() for _, affinity_T in seen)]).double()
        assert state.num_tokens_E[expert] == len(affinities)
        assert float(state.affinity_sum_E[expert]) == pytest.approx(float(affinities.sum()))
        assert float(state.affinity_square_sum_E[expert]) == pytest.approx(float(affinities.square().sum()))


def test_no_affinity_is_an_affinity_of_one() -> None:
    x_TI = batches()[0][1]
    states = [empty_state(1, 6, "cpu") for _ in range(2)]
    accumulate(states[0], 0, x_TI)
    accumulate(states[1], 0, x_TI, torch.ones(len(x_TI)), 1)
    assert torch.equal(states[0].sum_EII, states[1].sum_EII)
    assert effective_samples(states[0]).tolist() == effective_samples(states[1]).tolist() == [7.0]


def test_affinities_of_zero_weigh_nothing_and_keep_sums_finite() -> None:
    state = empty_state(1, 6, "cpu")
    accumulate(state, 0, batches()[0][1], torch.zeros(7), 1)
    assert not state.sum_EII.any()
    assert effective_samples(state).tolist() == [0.0]


def test_effective_samples_are_the_tokens_for_equal_affinities_and_fewer_for_unequal_ones() -> None:
    state = empty_state(3, 6, "cpu")
    accumulate(state, 0, torch.randn(4, 6), torch.full((4,), 0.3))
    accumulate(state, 1, torch.randn(4, 6), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(effective_samples(state), torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))


def test_mean_hessian_divides_by_tokens_and_is_zero_without_any() -> None:
    state = filled(1)
    mean_EII = mean_hessian(state)
    torch.testing.assert_close(mean_EII[0], (state.sum_EII[0] / 10).float())
    assert not mean_EII[1].any()


def test_sums_are_float64_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = filled(1, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert state.sum_EII.dtype == torch.float64
    assert state.num_tokens_E.dtype == torch.float64


def test_hessian_does_not_depend_on_the_order_of_the_batches() -> None:
    parts = [(torch.randn(50, 24) * 10.0**i, torch.rand(50)) for i in range(-3, 4)]
    means = []
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        state = empty_state(1, 24, "cpu")
        for x_TI, affinity_T in order:
            accumulate(state, 0, x_TI, affinity_T, 1)
        means.append(mean_hessian(state))
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


@pytest.mark.parametrize("features", [255, 256, 300, 513])
def test_panels_add_up_to_the_whole_symmetric_sum(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(tokens, features, generator=generator) for tokens in (40, 1, 0, 70)]
    state = empty_state(2, features, "cpu")
    for x_TI in parts:
        accumulate(state, 1, x_TI)
    expected_II = sum((x_TI.double().mT @ x_TI.double() for x_TI in parts), torch.zeros(features, features).double())
    torch.testing.assert_close(state.sum_EII[1], expected_II, rtol=1e-5, atol=1e-4)
    assert torch.equal(state.sum_EII[1], state.sum_EII[1].mT)
    assert not state.sum_EII[0].any()
