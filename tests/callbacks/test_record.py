"""What every phase was expected to take stands beside what it took, and Hessians agree to the byte."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

import moeq.forecast
from callbacks import learned_rounding
from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.record import Record
from moeq.fit.learn_block import tune_block
from moeq.fit.memory import DataShape
from moeq.fit.solve import Unit
from moeq.models.adapter import Adapter
from moeq.module import MoEQuantModule
from moeq.preflight.phases import Forecast
from moeq.quant.solution import Solution
from tests.callbacks.test_bit_allocation import Batches
from tests.live_bytes import LiveBytes
from tests.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Shaped(Batches):
    """Batches that say how many they are."""

    def shape(self) -> DataShape:
        return DataShape(1, 8, 1)


class CountingGPTQ(GPTQ):
    """Writes down the bytes of the Hessians that exist when a pass is solved, and of those it solves with at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[int] = []
        self.copies: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        if pl_module.current_pass.kind != "calibrate":
            return
        hessians, sites = pl_module.run.hessians, [part.site for part in pl_module.current_pass.parts]
        states = [state for site in sites for state in (hessians[site], hessians.pool(site)) if state is not None]
        # Storages, so that one Hessian that all experts share counts once.
        self.sums.append(sum(state.sum_EII.untyped_storage().nbytes() for state in states))
        self.copies.append(0)
        super().on_train_epoch_end(trainer, pl_module)

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        self.copies[-1] = max(self.copies[-1], hessian_EII.untyped_storage().nbytes())
        return super().solve(module, unit, weight_EOI, hessian_EII)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("record") / "model")


def fit(model: Path, folder: Path, *more: L.Callback, **settings: Any) -> tuple[CountingGPTQ, Forecast]:
    """Run a fit; returns what was counted and what was expected."""
    gptq = CountingGPTQ()
    module = MoEQuantModule(name=str(model), group_size=16, clip_search=False, **settings)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[HessianCalibration(), gptq, *more, Record()],
        logger=False, max_epochs=-1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Shaped())
    assert module.forecast is not None
    return gptq, module.forecast


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def held(forecast: Forecast, name: str) -> list[int]:
    """Bytes of one part in every solve."""
    solves = [phase for phase in forecast.phases if phase.kind == "solve"]
    return [max(moment.device[name] for moment in phase.moments) for phase in solves]


@pytest.mark.parametrize("sequential", ["stage", "block"])
@pytest.mark.parametrize("routing", ["routed", "all_experts"])
@pytest.mark.parametrize("megabytes", [0.2, 100.0])
def test_the_expected_hessians_are_those_that_are_allocated(
    megabytes: float, routing: str, sequential: str, model: Path, tmp_path: Path
) -> None:
    gptq, forecast = fit(model, tmp_path, hessian_gib=megabytes * 1e6 / 2**30, routing=routing, sequential=sequential)
    assert held(forecast, "Hessians") == gptq.sums
    assert held(forecast, "Hessians to solve") == gptq.copies
    assert all(sums + copies <= megabytes * 1e6 for sums, copies in zip(gptq.sums, gptq.copies, strict=True))


@pytest.mark.parametrize(("compute_dtype", "item_bytes"), [("stored", 2), ("float32", 4)])
def test_the_other_parts_are_the_model_and_the_states_of_all_tokens(
    model: Path, tmp_path: Path, compute_dtype: str, item_bytes: int
) -> None:
    _, forecast = fit(model, tmp_path, compute_dtype=compute_dtype)
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    moments = [moment for phase in forecast.phases for moment in phase.moments if phase.kind == "solve"]
    for moment in moments:
        # The files hold bfloat16 parameters, without buffers and tied weights, and a header.
        assert moment.device["model"] == pytest.approx(files * item_bytes / 2, rel=0.1)
        assert moment.host["hidden states"] == 8 * 64 * item_bytes  # tokens, width


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_every_phase_is_measured_beside_what_was_expected(model: Path, tmp_path: Path, placement: str) -> None:
    _, forecast = fit(model, tmp_path, placement=placement)
    rows = rows_of(tmp_path / "memory.csv")
    expected = {(phase.kind, phase.label) for phase in forecast.phases}
    assert {(row["phase"], row["label"]) for row in rows} == expected
    for row in rows:
        assert int(row["host_measured"]) > 0
        assert float(row["seconds_measured"]) >= 0
    files = [row for row in rows if row["phase"] == "block file"]
    assert len(files) == 2
    for row in files:  # a header and records beside the codes
        assert int(row["disk_expected"]) < int(row["disk_measured"]) < int(row["disk_expected"]) + 100_000
    assert "| block file " in (tmp_path / "summary.md").read_text()
    assert "hessian_gib" in json.loads((tmp_path / "manifest.json").read_text())


def test_learned_rounding_takes_what_is_expected_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []

    def tracked(adapter: Adapter, *rest: Any) -> tuple[float, float]:
        with LiveBytes() as live:
            found = tune_block(adapter, *rest)
        peaks.append(live.peak)
        return found

    monkeypatch.setattr(learned_rounding, "tune_block", tracked)
    _, forecast = fit(model, tmp_path, learned_rounding.LearnedRounding(num_steps=2), compute_dtype="stored")
    phases = [phase for phase in forecast.phases if phase.kind == "learned rounding"]
    assert len(phases) == len(peaks) == 2
    for phase, peak in zip(phases, peaks, strict=True):
        (moment,) = phase.moments
        assert moment.device["latents"] + moment.device["weights in float32"] == pytest.approx(peak, rel=0.15)


def test_a_long_run_is_measured_on_one_block_and_says_how_long(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moeq.forecast, "LONG_PRODUCTS", 0)
    _, forecast = fit(model, tmp_path, placement="stream")
    assert all(phase.seconds is not None for phase in forecast.phases if phase.kind not in ("load model", "sampling"))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_preflight_says_and_writes_and_stops(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(model, tmp_path, preflight=True)
    assert stopped.value.code == 0
    written = (tmp_path / "preflight.md").read_text()
    assert "| calibrate mlp_in " in written
    assert "**whole run**" in written
    assert json.loads((tmp_path / "preflight.json").read_text())["phases"]
    assert not (tmp_path / "blocks").exists()


def test_a_run_that_cannot_fit_stops_before_any_work_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moeq.forecast, "free_bytes", lambda device: -(1 << 40))
    with pytest.raises(ValueError, match=r"this run does not fit: load model \(model\) needs .* [MG]B of main memory"):
        fit(model, tmp_path)
    assert not (tmp_path / "preflight.md").exists()
    assert not (tmp_path / "blocks").exists()


def test_the_bound_on_hessians_is_chosen_and_codes_do_not_depend_on_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []
    for name, bound in (("auto", "auto"), ("given", 0.0003)):
        fit(model, tmp_path / name, hessian_gib=bound)
        blocks.append((tmp_path / name / "blocks/block_001.safetensors").read_bytes())
    assert blocks[0] == blocks[1]
