"""The factor of a Hessian: what it reproduces, and what is tried where there is none."""

import pytest
import torch

from moeq.quant.factor import ATTEMPTS, factorise, retry_reason
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
