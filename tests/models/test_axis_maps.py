"""Steps along an axis of a parameter, against products with explicit matrices in float64."""

import torch
from torch import Tensor

from moeq.models.axis_maps import Steps


def rotation(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def test_steps_apply_in_order_along_their_axes_and_round_once(generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, generator=generator).bfloat16()
    factor, turn = 1 + torch.rand(4, generator=generator).double(), rotation(6, generator)
    steps = Steps()
    steps.scale("w", -1, factor)
    steps.turn("w", -2, lambda x: x @ turn)  # type: ignore[arg-type]
    expected = turn.T @ (weight.double() * factor)
    found = steps.value("w", weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=1e-9)


def test_only_the_last_entries_of_each_head_turn(generator: torch.Generator) -> None:
    weight, turn = torch.randn(2 * 5, 3, generator=generator), rotation(2, generator)
    steps = Steps()
    steps.turn_heads("w", -2, 2, 2, lambda x: x @ turn)  # type: ignore[arg-type]
    expected = weight.double().clone()
    for rows in (slice(3, 5), slice(8, 10)):
        expected[rows] = turn.T @ weight[rows].double()
    torch.testing.assert_close(steps.value("w", weight).double(), expected, rtol=1e-6, atol=1e-7)


def test_every_expert_of_a_stack_is_changed_like_a_weight_of_its_own(generator: torch.Generator) -> None:
    stack, factor = torch.randn(3, 4, 5, generator=generator), torch.rand(5, generator=generator)
    steps = Steps()
    steps.scale("w", -1, factor)
    found = steps.value("w", stack)
    assert torch.equal(found, torch.stack([steps.value("w", weight) for weight in stack]))


def test_a_parameter_without_steps_keeps_its_values() -> None:
    weight = torch.tensor([1.0, -2.5])
    assert torch.equal(Steps().value("w", weight), weight)
