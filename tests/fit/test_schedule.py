from itertools import pairwise

import pytest

from moeq.fit.schedule import GIB, Pass, SitePart, build_schedule, whole
from moeq.models.adapter import Adapter
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def sites() -> list[tuple]:
    adapter = Adapter(tiny_model("deepseek_v3"))
    return [adapter.sites(block) for block in range(2)]


def calibrations(schedule: tuple[Pass, ...]) -> list[Pass]:
    return [each for each in schedule if each.kind == "calibrate"]


def test_every_site_is_calibrated_exactly_once_in_block_order(sites: list[tuple]) -> None:
    for sequential in ("stage", "block"):
        schedule = build_schedule(sites, survey=False, sequential=sequential)
        assert [site for p in schedule for site in p.sites] == [site for block in sites for site in block]


def test_stage_mode_gives_one_pass_per_stage_and_block_mode_one_per_block(sites: list[tuple]) -> None:
    for sequential, expected in (("stage", 10), ("block", 2)):
        schedule = build_schedule(sites, survey=False, sequential=sequential)
        assert sum(p.kind == "calibrate" for p in schedule) == expected


def test_a_survey_sweeps_every_block_first(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=True, sequential="block")
    assert [(p.kind, p.block) for p in schedule] == [
        ("survey", 0), ("survey", 1), ("calibrate", 0), ("advance", 0), ("calibrate", 1)
    ]  # fmt: skip


def test_only_the_last_pass_of_a_block_ends_it(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=True, sequential="stage")
    ends = [p.block for p in schedule if p.ends_block]
    assert ends == [0, 1]
    assert schedule[-1].ends_block


def test_a_resumed_run_only_advances_through_finished_blocks(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=False, sequential="block", first_block=1, originals=True)
    assert [(p.kind, p.block) for p in schedule] == [
        ("original", 0), ("advance", 0), ("original", 1), ("calibrate", 1)
    ]  # fmt: skip
    assert build_schedule(sites, survey=False, sequential="stage", first_block=2) == ()


def test_labels_say_block_and_stage(sites: list[tuple]) -> None:
    assert build_schedule(sites, survey=False, sequential="stage")[1].label == "block 0 attention_mid"


def needed(parts: tuple[SitePart, ...]) -> int:
    """Bytes by the numbers in the module's docstring."""
    total = 0
    for part in parts:
        num, pool = len(part.experts), part.site.num_experts > 1
        total += 8 * part.site.in_features**2 * (num + pool) + 4 * part.site.in_features**2 * num
    return total


@pytest.mark.parametrize("sequential", ["stage", "block"])
@pytest.mark.parametrize("megabytes", [0.1, 0.16, 0.25, 0.6, 2.0])
def test_chunks_hold_every_expert_once_in_order_and_stay_within_the_bound(
    sites: list[tuple], megabytes: float, sequential: str
) -> None:
    gib = megabytes * 1e6 / GIB
    schedule = calibrations(build_schedule(sites, survey=False, sequential=sequential, hessian_gib=gib))
    covered = [(part.site.name, expert) for p in schedule for part in p.parts for expert in part.experts]
    assert covered == [(site.name, expert) for block in sites for site in block for expert in range(site.num_experts)]
    assert all(0 < needed(p.parts) <= megabytes * 1e6 for p in schedule)
    assert [site for p in schedule for site in p.sites] == [site for block in sites for site in block]
    # Nothing is cut that fits: the first part of a chunk would not have fitted into the one before it.
    for before, after in pairwise(schedule):
        if after.chunk[0] > 1:
            first = after.parts[0]
            grown = {part.site: len(part.experts) for part in before.parts}
            grown[first.site] = grown.get(first.site, 0) + 1
            assert needed(tuple(SitePart(site, range(count)) for site, count in grown.items())) > megabytes * 1e6


def test_weights_are_written_after_the_last_chunk_of_their_sites(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=False, sequential="stage", hessian_gib=0.25e6 / GIB)
    chunked = [p for p in schedule if p.chunk[1] > 1]
    assert chunked
    assert all(bool(p.sites) == (p.chunk[0] == p.chunk[1]) for p in chunked)
    assert len({p.label for p in schedule}) == len(schedule)
    assert all(p.observed for p in calibrations(schedule))


def test_without_a_need_nothing_is_cut(sites: list[tuple]) -> None:
    for gib in (16.0, float("inf")):
        schedule = build_schedule(sites, survey=False, sequential="stage", hessian_gib=gib)
        assert all(p.parts == tuple(map(whole, p.sites)) and p.chunk == (1, 1) for p in schedule)


def test_with_all_experts_gate_and_up_are_summed_once(sites: list[tuple]) -> None:
    schedule = build_schedule(sites, survey=False, sequential="stage", routing="all_experts")
    shared = [part for p in schedule for part in p.parts if part.shared]
    assert [part.site.name for part in shared] == ["model.layers.1.mlp.experts.gate_proj+up_proj"]
    assert shared[0].sum_bytes == 8 * 64**2
    assert shared[0].working_bytes == 4 * 64**2 * 8


def test_an_expert_that_exceeds_the_bound_is_refused_with_bytes_and_remedy(sites: list[tuple]) -> None:
    with pytest.raises(ValueError, match=r"hessian_gib \(1e-05\) must hold one Hessian of .*q_a_proj.*--model\.hess"):
        build_schedule(sites, survey=False, sequential="stage", hessian_gib=1e-5)
