"""The floor counts the operations of a block as a loop over its linears would."""

from pathlib import Path

import pytest
import torch

from benchmarks.large.checkpoint import Shape
from benchmarks.large.floor import (
    Rates,
    block_floor,
    forward_operations,
    hessian_operations,
    product_rate,
    reading_rate,
    solve_operations,
)

SHAPE = Shape(64, 4, 2, 16, 8, 2, 32, 512)


def test_forward_operations_are_two_per_weight_and_token_and_the_scores() -> None:
    tokens, length = 32, 16
    attention = 64 * (64 + 32 + 32) + 64 * 64
    experts = 2 * 3 * 64 * 32
    # Each query meets half of the keys on average; a score and its value are 2 * head_dim operations each.
    scores = tokens * 4 * (length / 2) * (2 * 16 + 2 * 16)
    assert forward_operations(SHAPE, tokens, length) == 2 * tokens * (attention + experts + 64 * 8) + scores


def test_hessians_are_half_of_a_product_of_the_inputs() -> None:
    # Two inputs of attention and, for two experts per token, one of gate and up and one of down.
    assert hessian_operations(SHAPE, 32) == 32 * (64**2 + 64**2 + 2 * (64**2 + 32**2))


def test_solves_are_feedback_and_factor_of_every_linear() -> None:
    attention = 128 * 64**2 + 64**3 / 3 + 64 * 64**2 + 64**3 / 3
    expert = 64 * 64**2 + 64**3 / 3 + 64 * 32**2 + 32**3 / 3
    assert solve_operations(SHAPE) == pytest.approx(attention + 8 * expert)


def test_the_floor_is_the_sum_of_its_parts() -> None:
    floor = block_floor(SHAPE, 1000, 32, 16, Rates(read=500, model_products=1e6, float32_products=1e6))
    assert floor.read == 2
    assert floor.total == floor.read + floor.forward + floor.hessians + floor.solves
    assert floor.forward == 2 * forward_operations(SHAPE, 32, 16) / 1e6


def test_rates_are_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    assert reading_rate(tmp_path / "file") > 0
    assert product_rate(torch.float32, 8, 8, 8, seconds=0.001) > 0
