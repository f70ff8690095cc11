import pytest
import torch
from torch import Tensor

from moeq.quant.router_fit import add_router_inputs, empty_router_state, refit_router


def data(seed: int = 0, num_tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """A router, inputs in the original, and the same inputs after some damage."""
    generator = torch.Generator().manual_seed(seed)
    weight_ED = torch.randn(6, 16, generator=generator)
    x_TD = torch.randn(num_tokens, 16, generator=generator)
    mixing_DD = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator)
    return weight_ED, x_TD, x_TD @ mixing_DD + 0.05 * torch.randn(num_tokens, 16, generator=generator)


def refitted(ridge: float, batch: int = 300) -> tuple[Tensor, float]:
    weight_ED, x_TD, damaged_TD = data()
    state = empty_router_state(6, 16, "cpu")
    for original_TD, now_TD in zip(x_TD.split(batch), damaged_TD.split(batch), strict=True):
        add_router_inputs(state, weight_ED, now_TD, original_TD @ weight_ED.mT)
    return refit_router(weight_ED, state, ridge)


def reference_refit(ridge: float) -> Tensor:
    """Ordinary least squares on rows of data and, for the ridge, rows that ask for no change."""
    weight_ED, x_TD, damaged_TD = (tensor.double() for tensor in data())
    strength = ridge * damaged_TD.square().sum() / 16
    rows = torch.cat([damaged_TD, strength.sqrt() * torch.eye(16, dtype=torch.float64)])
    wanted = torch.cat([x_TD @ weight_ED.mT, strength.sqrt() * weight_ED.mT])
    return torch.linalg.lstsq(rows, wanted).solution.mT


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_the_refit_is_the_least_squares_solution(ridge: float) -> None:
    torch.testing.assert_close(refitted(ridge)[0], reference_refit(ridge), rtol=1e-4, atol=1e-4)


def test_the_share_left_is_that_of_the_logits() -> None:
    weight_ED, x_TD, damaged_TD = data()
    new_ED, share = refitted(0.01)
    wanted_TE = x_TD @ weight_ED.mT
    before, after = ((wanted_TE - damaged_TD @ w.mT).double().square().sum() for w in (weight_ED, new_ED.float()))
    assert share == pytest.approx(float(after / before), rel=1e-3)
    assert share < 0.5


def test_a_router_whose_inputs_did_not_change_stays() -> None:
    weight_ED, x_TD, _ = data()
    state = empty_router_state(6, 16, "cpu")
    add_router_inputs(state, weight_ED, x_TD, x_TD @ weight_ED.mT)
    new_ED, share = refit_router(weight_ED, state, 0.01)
    assert torch.equal(new_ED.float(), weight_ED)
    assert share == 1.0


def test_a_stronger_ridge_changes_less() -> None:
    weight_ED = data()[0]
    changes = [float((refitted(ridge)[0] - weight_ED).norm()) for ridge in (0.001, 0.1, 10.0)]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.2 * changes[0]


def test_batches_add_up() -> None:
    torch.testing.assert_close(refitted(0.01, batch=300)[0], refitted(0.01, batch=60)[0], rtol=1e-5, atol=1e-6)


def test_a_router_that_saw_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="0 calibration tokens"):
        refit_router(torch.ones(2, 3), empty_router_state(2, 3, "cpu"), 0.1)
