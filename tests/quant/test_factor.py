"""The factor of a Hessian: what it reproduces, and what is tried where there is none."""

import pytest
import torch

from moeq.quant.factor import ATTEMPTS, factorise, factorise_together, retry_reason
from tests.quant.obq import problem


@pytest.mark.parametrize("size", [40, 128, 300])
def test_the_reversed_factor_reproduces_the_damped_hessian(size: int) -> None:
    _, hessian_EII = problem(6, shape=(1, size))
    feedback = factorise(hessian_EII[0], 0.01, act_order=True)
    factor_II = feedback.feedback_II.tril().double() * feedback.gain_I.double().unsqueeze(1)
    visited_II = hessian_EII[0][feedback.order_I][:, feedback.order_I].double()
    expected_II = visited_II + feedback.shift_I.double().diag()
    torch.testing.assert_close(factor_II.mT @ factor_II, expected_II, rtol=1e-4, atol=1e-5)
    assert not feedback.failed


@pytest.mark.parametrize("act_order", [True, False])
def test_hessians_factorised_together_have_the_factors_of_each_also_where_some_are_retried(act_order: bool) -> None:
    hessian_EII = torch.cat([problem(seed, shape=(1, 150))[1] for seed in range(4)])
    hessian_EII[1] = hessian_EII[1] - 0.02 * hessian_EII[1].diagonal().mean() * torch.eye(150)
    hessian_EII[2] = float("nan")
    each = [factorise(hessian_II, 0.001, act_order) for hessian_II in hessian_EII]
    together = factorise_together(hessian_EII, 0.001, act_order)
    assert [factor.num_retries for factor in together] == [factor.num_retries for factor in each]
    assert [factor.failed for factor in together] == [False, False, True, False]
    assert 0 < each[1].num_retries < len(ATTEMPTS)
    for found, expected in zip(together, each, strict=True):
        assert torch.equal(found.order_I, expected.order_I)
        torch.testing.assert_close(found.shift_I, expected.shift_I)
        torch.testing.assert_close(found.gain_I, expected.gain_I, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.feedback_II.tril(), expected.feedback_II.tril(), rtol=1e-3, atol=1e-4)


def test_dead_columns_get_one_on_the_diagonal_and_no_part_in_the_mean_that_damps() -> None:
    _, hessian_EII = problem(6, shape=(1, 40))
    hessian_II = hessian_EII[0]
    hessian_II[7] = hessian_II[:, 7] = 0.0
    feedback = factorise(hessian_II, 0.01, act_order=True)
    assert int(feedback.order_I[-1]) == 7
    assert feedback.shift_I[-1] == 1.0
    alive_I = torch.arange(40) != 7
    expected = 0.01 * float(hessian_II.diagonal()[alive_I].mean())
    torch.testing.assert_close(feedback.shift_I[:-1], torch.full((39,), expected))
    assert not feedback.feedback_II[-1, :-1].any(), "a dead column is corrected by none"


def test_act_order_visits_columns_by_decreasing_diagonal() -> None:
    _, hessian_EII = problem(6, shape=(1, 40))
    order_I = factorise(hessian_EII[0], 0.01, act_order=True).order_I
    visited_I = hessian_EII[0].diagonal()[order_I]
    assert torch.equal(visited_I, visited_I.sort(descending=True).values)
    assert torch.equal(factorise(hessian_EII[0], 0.01, act_order=False).order_I, torch.arange(40))


def test_every_attempt_has_a_reason_and_the_last_is_rounding() -> None:
    reasons = [retry_reason(number) for number in range(1, len(ATTEMPTS) + 1)]
    assert reasons[0] == ("factorisation retried in float64", "float64 succeeded")
    assert [detail for _, detail in reasons[1:4]] == [
        f"damping times {n}, after float64 failed" for n in (10, 100, 1000)
    ]
    assert reasons[4] == ("factorisation failed", "rounded to nearest")
