"""The time of a fit is arithmetic on a few measured seconds."""

import pytest

from moeq.fit.duration import Speed, block_products, pass_seconds, solve_products, solve_seconds, stages_of
from moeq.fit.schedule import Pass, build_schedule, whole
from moeq.models.adapter import Adapter
from tests.tiny import tiny_model

SPEED = Speed(
    block=0, read=1e9, write=1e8, forward=2.0, sweeps={"attention_in": 0.5, "mlp_in": 3.0}, solves={(100, 10): 1.5},
    products=1000,
)  # fmt: skip


@pytest.fixture(scope="module")
def schedule() -> tuple[Pass, ...]:
    adapter = Adapter(tiny_model("qwen3_moe"))
    return build_schedule([adapter.sites(block) for block in range(2)], survey=False, sequential="stage")


def find(schedule: tuple[Pass, ...], stages: str) -> Pass:
    return next(each for each in schedule if stages_of(each) == stages)


def test_a_pass_is_its_batches_times_one_batch_of_its_stages(schedule: tuple[Pass, ...]) -> None:
    assert pass_seconds(find(schedule, "attention_in"), SPEED, num_batches=7, products=1000) == 7 * 0.5
    assert pass_seconds(find(schedule, "mlp_in"), SPEED, num_batches=7, products=1000) == 7 * 3.0


def test_a_pass_that_observes_nothing_is_as_long_as_the_block_runs(schedule: tuple[Pass, ...]) -> None:
    advance = next(each for each in schedule if each.kind == "advance")
    assert pass_seconds(advance, SPEED, num_batches=7, products=1000) == 7 * 2.0
    assert pass_seconds(find(schedule, "mlp_down"), SPEED, num_batches=7, products=1000) == 7 * 2.0


def test_a_block_of_twice_the_products_takes_twice_the_time(schedule: tuple[Pass, ...]) -> None:
    assert pass_seconds(find(schedule, "mlp_in"), SPEED, num_batches=1, products=2000) == 6.0


def test_products_of_a_batch_count_routed_experts_as_often_as_a_token_uses_them() -> None:
    adapter = Adapter(tiny_model("qwen3_moe"))
    weights = 0
    for site in adapter.sites(0):
        weights += sum(site.rows) * site.in_features * (2 if site.kind == "routed" else 1)
    assert block_products(adapter.sites(0), num_tokens=10, experts_per_token=2) == 10 * weights


def test_solves_are_those_of_their_shape_and_others_in_proportion(schedule: tuple[Pass, ...]) -> None:
    adapter = Adapter(tiny_model("qwen3_moe"))
    part = whole(next(site for site in adapter.sites(0) if site.stage == "mlp_in"))
    shape = sum(part.site.rows), part.site.in_features
    known = Speed(0, 1.0, 1.0, 1.0, {}, {shape: 0.25}, 1)
    assert solve_seconds([part], known) == len(part.experts) * 0.25
    expected = len(part.experts) * 1.5 * solve_products(*shape) / solve_products(100, 10)
    assert solve_seconds([part], SPEED) == pytest.approx(expected)
    assert solve_seconds([part], Speed(0, 1.0, 1.0, 1.0, {}, {}, 1)) == 0.0
