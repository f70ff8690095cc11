from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from datamodules.given_ids import GivenIdsDataModule
from tests.datamodules.stub import StubTrainer
from tests.tiny import tiny_model

IDS = torch.arange(40).view(5, 8) + 100


def attached(tmp_path: Path, rank: int = 0, world_size: int = 1, **settings: Any) -> GivenIdsDataModule:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": IDS}, path)
    datamodule = GivenIdsDataModule(**{"path": str(path), "batch_size": 2, **settings})
    datamodule.trainer = StubTrainer(tmp_path, tiny_model("mixtral"), rank, world_size)
    return datamodule


def test_batches_are_the_sequences_of_the_file(tmp_path: Path) -> None:
    batches = [batch["input_ids"] for batch in attached(tmp_path).train_dataloader()]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), IDS)
    assert torch.equal(attached(tmp_path, num_sequences=3).calibration_ids(), IDS[:3])


def test_ranks_share_them(tmp_path: Path) -> None:
    shares = [torch.cat([b["input_ids"] for b in attached(tmp_path, r, 2).train_dataloader()]) for r in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == IDS.tolist()


def test_a_model_on_the_meta_device_is_enough(tmp_path: Path) -> None:
    datamodule = attached(tmp_path)
    datamodule.trainer.lightning_module.model.to("meta")
    assert torch.equal(datamodule.calibration_ids(), IDS)


def test_what_the_model_cannot_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_sequences \(0\) must be at least 1"):
        GivenIdsDataModule("a.npy", num_sequences=0)
    with pytest.raises(ValueError, match=r"num_sequences \(6\) exceeds the 5 sequences of .*; choose at most 5"):
        attached(tmp_path, num_sequences=6).calibration_ids()
    long, foreign = tmp_path / "long.safetensors", tmp_path / "foreign.safetensors"
    save_file({"input_ids": torch.ones(2, 513, dtype=torch.int64)}, long)
    save_file({"input_ids": torch.full((2, 8), 264)}, foreign)
    with pytest.raises(ValueError, match=r"length \(513\) must not exceed the 512 positions"):
        attached(tmp_path, path=str(long)).calibration_ids()
    with pytest.raises(ValueError, match=r"16 ids that are no tokens of the model, first 264 .* ids go from 0 to 263"):
        attached(tmp_path, path=str(foreign)).calibration_ids()
