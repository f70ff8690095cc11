"""Phases of a fit: what each moment holds, by name, follows from the schedule and the shapes."""

from dataclasses import replace

import pytest
import torch

import moeq.fit.share
from moeq.allocation.plan import uniform_plan
from moeq.fit.duration import Speed
from moeq.fit.memory import DataShape, block_file_bytes
from moeq.fit.preflight import FitWork, fit_phases, largest_hessians, least_hessians
from moeq.fit.run import Needs
from moeq.fit.schedule import build_schedule
from moeq.models.adapter import Adapter
from moeq.models.shapes import weight_shapes
from moeq.models.sizes import hidden_bytes, model_bytes
from moeq.preflight.phases import Moment, Phase
from moeq.quant.spec import GridSpec
from tests.tiny import tiny_model

GB = 10**9


def work_of(
    *, streamed: bool = True, hessian_gib: float = 1.0, needs: Needs | None = None, device: str = "cpu"
) -> FitWork:
    with torch.device("meta"):
        adapter = Adapter(tiny_model("qwen3_moe"))
    sites, needs = [adapter.sites(block) for block in range(2)], needs or Needs()
    shapes = weight_shapes(adapter)
    files = block_file_bytes(shapes, uniform_plan(shapes, GridSpec(4, 16)), 4, 2)
    return FitWork(
        adapter=adapter,
        schedule=build_schedule(
            sites, survey=needs.survey, sequential="stage", hessian_gib=hessian_gib, originals=needs.originals
        ),
        model=model_bytes(adapter, streamed=streamed), data=DataShape(8, 32, 4), block_files=files,
        num_quantized=sum(shape.numel for shape in shapes), experts_per_token=2, needs=needs, hidden_bytes=GB,
        device_type=device, solved=True,
    )  # fmt: skip


def test_a_streamed_fit_loads_each_block_sweeps_solves_writes_and_advances() -> None:
    kinds = [phase.kind for phase in fit_phases(work_of())]
    one_block = ["load block"]
    for stage in ("attention_in", "attention_out", "mlp_in", "mlp_down"):
        one_block += [f"calibrate {stage}", "solve"]
    assert kinds == [*one_block, "block file", "advance", *one_block, "block file"]


def test_every_pass_has_a_phase_of_its_label() -> None:
    work = work_of(needs=Needs(survey=True, originals=True), hessian_gib=0.0003)
    labels = [phase.label for phase in fit_phases(work)]
    assert {current.label for current in work.schedule} <= set(labels)
    once = [label for label in labels if not label.endswith("load")]  # a survey reads the blocks, too
    assert len(set(once)) == len(once)


def test_in_memory_the_whole_model_is_held_and_no_block_is_loaded() -> None:
    work = work_of(streamed=False)
    phases = fit_phases(work)
    assert "load block" not in {phase.kind for phase in phases}
    for phase in phases:
        for moment in phase.moments:
            assert moment.device["model"] == work.model.total


def test_a_solve_holds_the_block_the_hessians_their_copies_the_stack_and_codes_so_far() -> None:
    work = work_of()
    phase = next(phase for phase in fit_phases(work) if phase.label == "block 0 mlp_in solve")
    (moment,) = phase.moments
    site = next(site for site in work.adapter.sites(0) if site.stage == "mlp_in")
    assert moment.device["block"] == work.model.blocks[0]
    assert moment.device["Hessians"] == 8 * site.in_features**2 * (site.num_experts + 1)
    assert moment.device["Hessians to solve"] == 4 * site.in_features**2 * site.num_experts
    before = [site for site in work.adapter.sites(0) if site.stage in ("attention_in", "attention_out", "mlp_in")]
    assert moment.host["codes"] == sum(sum(s.rows) * s.in_features * s.num_experts for s in before)
    assert moment.host["hidden states"] == hidden_bytes(work.adapter, 8 * 32)


def test_hidden_states_beyond_their_bound_are_not_in_memory() -> None:
    work = work_of()
    states = sum(work.waiting.values())
    bounded = replace(work, hidden_bytes=states // 4)
    assert (sum(bounded.waiting.values()), bounded.waiting_on_disk) == (states // 4, states - states // 4)
    originals = work_of(needs=Needs(originals=True))
    assert sum(originals.waiting.values()) == 2 * states


def test_chunks_of_a_bound_hold_no_more_hessians_than_the_bound() -> None:
    bound = 0.0003
    work = work_of(hessian_gib=bound)
    held = [moment.device for phase in fit_phases(work) for moment in phase.moments if phase.kind == "solve"]
    assert max(parts["Hessians"] + parts["Hessians to solve"] for parts in held) <= bound * 2**30
    assert least_hessians(work.schedule) <= largest_hessians(work.schedule) <= bound * 2**30
    assert largest_hessians(work_of().schedule) > bound * 2**30


def test_ranks_divide_batches_and_solves() -> None:
    alone, both = work_of(), replace(work_of(), num_ranks=2)
    assert both.num_batches == alone.num_batches // 2
    speed = Speed(0, 1e9, 1e9, 2.0, {}, {(64, 64): 1.0}, 0)
    seconds = [
        sum(phase.seconds or 0.0 for phase in fit_phases(replace(work, speed=speed)) if phase.kind == "solve")
        for work in (alone, both)
    ]
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_a_stack_is_cut_where_its_work_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(phase for phase in fit_phases(work_of()) if phase.label == "block 0 mlp_in solve").moments[0]
    monkeypatch.setattr(moeq.fit.share, "UNIT_OPERATIONS", 1)
    alone = next(phase for phase in fit_phases(work_of()) if phase.label == "block 0 mlp_in solve").moments[0]
    for part in ("Hessians to solve", "weights to solve", "codes of the stack"):
        assert whole.device[part] == 8 * alone.device[part]
    assert whole.device["Hessians"] == alone.device["Hessians"]


def test_times_are_there_where_something_was_measured() -> None:
    assert {phase.seconds for phase in fit_phases(work_of())} == {None}
    speed = Speed(0, 1e9, 1e9, 2.0, {}, {(128, 64): 1.0}, 0)
    seconds = {phase.label: phase.seconds for phase in fit_phases(replace(work_of(), speed=speed))}
    assert all(value is not None and value > 0 for value in seconds.values())
    assert seconds["block 0 advance"] == 2 * 2.0


def test_a_step_may_know_better_what_a_pass_takes() -> None:
    known = Phase("survey", "block 1 survey", (Moment({"Hessians": GB}),))
    phases = fit_phases(work_of(needs=Needs(survey=True)), {known.label: known})
    assert known in phases
    assert "block 0 survey" in {phase.label for phase in phases}


def test_a_run_without_a_method_solves_nothing() -> None:
    kinds = {phase.kind for phase in fit_phases(replace(work_of(), solved=False))}
    assert kinds.isdisjoint({"solve", "block file"})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_experts_advance_together_on_an_accelerator(device: str) -> None:
    solves = [phase for phase in fit_phases(work_of(device=device)) if phase.label == "block 0 mlp_in solve"]
    (moment,) = solves[0].moments
    assert moment.device["workspace"] >= 4 * 64 * (3 * 64 + 6 * 64) * 8
