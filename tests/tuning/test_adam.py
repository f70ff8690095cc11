"""Adam by rows: the library's for rows that always have tokens, and nothing at all for rows without."""

import torch

from moeq.tuning.adam import BETAS, EPSILON, adam_step, no_moments


def gradients(num_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 2, generator=generator) for _ in range(num_steps)]


def reference(values: torch.Tensor, steps: list[torch.Tensor], rate: float) -> torch.Tensor:
    leaf = values.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=rate, betas=BETAS, eps=EPSILON)
    for gradient in steps:
        leaf.grad = gradient.clone()
        optimizer.step()
    return leaf.detach()


def test_rows_with_tokens_take_the_steps_of_the_library() -> None:
    start = torch.ones(3, 4, 2)
    value, moments = start.clone(), no_moments(start)
    for gradient in gradients(5):
        adam_step(value, gradient, moments, 0.1, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(value, reference(start, gradients(5), 0.1))


def test_a_row_that_is_left_out_goes_on_where_it_was() -> None:
    start = torch.ones(3, 4, 2)
    value, moments = start.clone(), no_moments(start)
    steps = gradients(5)
    for number, gradient in enumerate(steps):
        before = value.clone()
        active_E = torch.tensor([True, number in (1, 4), False])
        adam_step(value, gradient, moments, 0.1, active_E)
        assert torch.equal(value[~active_E], before[~active_E])
    torch.testing.assert_close(value[0], reference(start, steps, 0.1)[0])
    torch.testing.assert_close(value[1], reference(start, [steps[1], steps[4]], 0.1)[1])
    assert torch.equal(value[2], start[2])
    assert moments.steps_E.tolist() == [5, 2, 0]
