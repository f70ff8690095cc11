"""A fit that streams its blocks ends with the bytes of one that holds them all, with every step.

``tests/test_families.py`` has the same of every family.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from callbacks.awq import AWQ
from callbacks.bit_allocation import BitAllocation
from callbacks.expert_usage import ExpertUsage
from callbacks.export import Export
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.learned_rounding import LearnedRounding
from callbacks.record import Record
from callbacks.rotation import Rotation
from callbacks.router_calibration import RouterCalibration
from callbacks.rtn import RTN
from callbacks.survey import Survey
from moeq.checkpoint.loading import model_bytes, working_bytes
from moeq.module import MoEQuantModule
from tests.own_fit import fit_own
from tests.same_bytes import assert_no_block_stayed, assert_same_bytes, written
from tests.tiny import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
Steps = list[Callback]


def fit(steps: Steps, model: Path, folder: Path, placement: str, **options: object) -> MoEQuantModule:
    return fit_own(steps, model, folder, bits=3, group_size=16, placement=placement, **options)


STEPS: dict[str, Callable[[], Steps]] = {
    "rotated, routers refitted, rounding learned": lambda: [
        Rotation(), HessianCalibration(), GPTQ(), RouterCalibration(), LearnedRounding(num_steps=3), ExpertUsage(),
        Export(), Record(),
    ],
    "surveyed and allocated": lambda: [
        Survey(choices=[2, 4], costs=["fisher", "gemq"], num_gradient_batches=2),
        BitAllocation(method="allocate", cost="fisher", budget=3.0, choices=[2, 4]), HessianCalibration(), GPTQ(),
        Export(),
    ],
    "channels scaled": lambda: [HessianCalibration(), AWQ(), Export(formats=["moeq"])],
    "rounded to nearest": lambda: [RTN(), Export(formats=["moeq"])],
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("steps", STEPS)
def test_every_step_has_the_bytes_of_a_fit_in_memory(steps: str, family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    fit(STEPS[steps](), model, tmp_path / "memory", "memory")
    streamed = fit(STEPS[steps](), model, tmp_path / "stream", "stream")
    assert_same_bytes(tmp_path / "memory", tmp_path / "stream")
    assert_no_block_stayed(streamed)


def test_waiting_states_on_disk_and_small_hessians_change_nothing(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    fit([HessianCalibration(), GPTQ(), Export()], model, tmp_path / "wide", "memory")
    fit([HessianCalibration(), GPTQ(), Export()], model, tmp_path / "tight", "stream", hidden_gib=0, hessian_gib=1e-3)
    assert written(tmp_path / "wide") == written(tmp_path / "tight")


@pytest.mark.parametrize("placements", [("memory", "stream"), ("stream", "memory")])
def test_a_run_may_go_on_in_the_other_placement(placements: tuple[str, str], tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model", num_hidden_layers=3)

    def steps() -> Steps:
        return [Rotation(), HessianCalibration(), GPTQ(), LearnedRounding(num_steps=2), Export()]

    fit(steps(), model, tmp_path / "whole", placements[0])
    fit(steps()[:-1], model, tmp_path / "parts", placements[0])
    for block in (1, 2):
        (tmp_path / f"parts/blocks/block_{block:03d}.safetensors").unlink()
    fit(steps(), model, tmp_path / "parts", placements[1])
    assert written(tmp_path / "whole") == written(tmp_path / "parts")


def test_auto_streams_a_model_that_does_not_fit_with_what_a_fit_has_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    least = model_bytes(str(model), compute="float32") + working_bytes(str(model))
    for free, expected in ((least, "memory"), (least - 1, "stream")):
        monkeypatch.setattr("moeq.module.free_bytes", lambda device, free=free: free)
        module = MoEQuantModule(str(model), compute_dtype="float32")
        module.configure_model()
        assert module.placement.kind == expected
        assert module.adapter.sites(0)
