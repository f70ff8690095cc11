import pytest

from moeq.models.adapter import Adapter
from moeq.schedule import build_schedule
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def sites() -> list[tuple]:
    adapter = Adapter(tiny_model("deepseek_v3"))
    return [adapter.sites(block) for block in range(2)]


def test_every_site_is_calibrated_exactly_once_in_block_order(sites: list[tuple]) -> None:
    for sequential in ("stage", "block"):
        schedule = build_schedule(sites, survey=False, sequential=sequential)
        assert [site for p in schedule for site in p.sites] == [site for block in sites for site in block]


def test_stage_mode_gives_one_pass_per_stage_and_block_mode_one_per_block(sites: list[tuple]) -> None:
    assert len(build_schedule(sites, survey=False, sequential="stage")) == 10
    assert len(build_schedule(sites, survey=False, sequential="block")) == 2


def test_a_survey_sweeps_every_block_first(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=True, sequential="block")
    assert [(p.kind, p.block) for p in schedule] == [
        ("survey", 0), ("survey", 1), ("calibrate", 0), ("calibrate", 1)
    ]  # fmt: skip


def test_only_the_last_pass_of_a_block_ends_it(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=True, sequential="stage")
    ends = [p.block for p in schedule if p.ends_block]
    assert ends == [0, 1]
    assert schedule[-1].ends_block


def test_finished_blocks_are_left_out(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=False, sequential="stage", first_block=1)
    assert {p.block for p in schedule} == {1}
    assert build_schedule(sites, survey=False, sequential="stage", first_block=2) == ()


def test_labels_say_block_and_stage(sites: list[tuple]) -> None:
    assert build_schedule(sites, survey=False, sequential="stage")[1].label == "block 0 attention_mid"
