import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.expert_usage import ExpertUsage
from callbacks.hessian_calibration import HessianCalibration
from moeq.models.adapter import Adapter
from moeq.models.observe import observe_routing
from moeq.module import MoEQuantModule
from tests.tiny import save_tiny, tiny_model


class Batches(L.LightningDataModule):
    """Two batches of random ids, the second with padding."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 257, (4, 12), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[3, 7:] = 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(self.ids, self.mask, strict=True)]
        return DataLoader(rows, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("usage") / "model", dtype=torch.float32)


def direct_counts(data: Batches) -> dict[str, list[int]]:
    """Tokens per expert in whole forward passes of the original model."""
    model = tiny_model("qwen2_moe")
    counts = {path: torch.zeros(8, dtype=torch.int64) for path in Adapter(model).expert_modules()}
    for rows in (slice(0, 2), slice(2, 4)):
        keep = data.mask[rows].flatten().bool()

        def count(path: str, ids_TK: Tensor, _: Tensor, keep: Tensor = keep) -> None:
            counts[path] += ids_TK[keep].flatten().bincount(minlength=8)

        with observe_routing(Adapter(model).expert_modules(), count):
            model(data.ids[rows], attention_mask=data.mask[rows])
    return {path: values.tolist() for path, values in counts.items()}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("survey", [True, False])
def test_usage_equals_counting_in_whole_forward_passes(survey: bool, model: Path, tmp_path: Path) -> None:
    data = Batches()
    module = MoEQuantModule(name=str(model), group_size=16)
    callbacks = [ExpertUsage(survey), HessianCalibration()]
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    # Nothing is quantized in this run, so both ways of counting see the original model.
    assert json.loads((tmp_path / "expert_usage.json").read_text()) == direct_counts(data)
    # Two blocks of four stages; the batches advance through the first.
    assert len(module.walk.schedule) == (2 if survey else 0) + 2 * 4 + 1
