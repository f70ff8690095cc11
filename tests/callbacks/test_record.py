"""The memory of every pass: what is expected is what is allocated, and both are in the run folder."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.record import Record
from moeq.fit.memory import peak_memory_bytes, start_peak
from moeq.fit.solve import Unit
from moeq.module import MoEQuantModule
from moeq.quant.solution import Solution
from tests.callbacks.test_bit_allocation import Batches
from tests.tiny import save_tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class CountingGPTQ(GPTQ):
    """Writes down the bytes of the Hessians that exist when a pass is solved, and of those it solves with."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[int] = []
        self.copies: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MoEQuantModule)
        hessians, sites = pl_module.run.hessians, [part.site for part in pl_module.current_pass.parts]
        states = [state for site in sites for state in (hessians[site], hessians.pool(site)) if state is not None]
        # Storages, so that one Hessian that all experts share counts once.
        self.sums.append(sum(state.sum_EII.untyped_storage().nbytes() for state in states))
        self.copies.append(0)
        super().on_train_epoch_end(trainer, pl_module)

    def solve(self, module: MoEQuantModule, unit: Unit, weight_EOI: Tensor, hessian_EII: Tensor) -> Solution:
        self.copies[-1] += hessian_EII.untyped_storage().nbytes()
        return super().solve(module, unit, weight_EOI, hessian_EII)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("record") / "model")


def fit(model: Path, folder: Path, **settings: Any) -> tuple[CountingGPTQ, list[dict[str, Any]]]:
    """Run a fit; returns what was counted and the rows of memory.csv."""
    gptq = CountingGPTQ()
    module = MoEQuantModule(name=str(model), group_size=16, clip_search=False, **settings)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[HessianCalibration(), gptq, Record()], logger=False,
        max_epochs=-1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Batches())
    with (folder / "memory.csv").open(newline="") as file:
        return gptq, [{k: v if k == "label" else int(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("sequential", ["stage", "block"])
@pytest.mark.parametrize("routing", ["routed", "all_experts"])
@pytest.mark.parametrize("megabytes", [0.2, 100.0])
def test_the_expected_hessians_are_those_that_are_allocated(
    megabytes: float, routing: str, sequential: str, model: Path, tmp_path: Path
) -> None:
    gptq, rows = fit(model, tmp_path, hessian_gib=megabytes * 1e6 / 2**30, routing=routing, sequential=sequential)
    assert [row["hessian_sums"] for row in rows] == gptq.sums
    assert [row["hessian_copies"] for row in rows] == gptq.copies
    assert all(sums + copies <= megabytes * 1e6 for sums, copies in zip(gptq.sums, gptq.copies, strict=True))


@pytest.mark.parametrize(("compute_dtype", "item_bytes"), [("stored", 2), ("float32", 4)])
def test_the_other_parts_are_the_model_and_the_states_of_all_tokens(
    model: Path, tmp_path: Path, compute_dtype: str, item_bytes: int
) -> None:
    _, rows = fit(model, tmp_path, compute_dtype=compute_dtype)
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    for row in rows:
        # The files hold bfloat16 parameters, without buffers and tied weights, and a header.
        assert row["model"] == pytest.approx(files * item_bytes / 2, rel=0.1)
        assert row["activations"] == 8 * 64 * item_bytes  # tokens, width
        parts = ("model", "activations", "hessian_sums", "hessian_copies")
        assert row["expected"] == sum(row[part] for part in parts)
    assert len({row["label"] for row in rows}) == len(rows) == 8


def test_a_peak_covers_what_came_after_it_was_started_and_nothing_before() -> None:
    size = 200 << 20
    start_peak(CPU)
    before = peak_memory_bytes(CPU)
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_memory_bytes(CPU) - before == pytest.approx(size, rel=0.1)
    del block
    start_peak(CPU)
    assert peak_memory_bytes(CPU) - before < 0.2 * size
