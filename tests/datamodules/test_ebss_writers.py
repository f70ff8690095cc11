"""Who writes the sequences of ``EBSSDataModule``, of a model whose blocks are streamed from its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import datamodules.ebss
import moeq.checkpoint.free_memory
import moeq.sampling.open_writer
from datamodules.ebss import EBSSDataModule
from moeq.checkpoint.stream import open_stream
from tests.datamodules.stub import StubTrainer
from tests.tiny import save_tiny, tiny_model

SMALL = {"num_sequences": 4, "length": 12, "branches": 2, "starts": 2, "sequences_at_once": 4, "batch_size": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("files"))


def attached(run_dir: Path, files: Path | None = None, **settings: Any) -> EBSSDataModule:
    """Of a streamed model where its files are given, else of one in memory."""
    datamodule = EBSSDataModule(**{**SMALL, **settings})
    if files is None:
        datamodule.trainer = StubTrainer(run_dir, tiny_model("qwen2_moe", dtype=torch.bfloat16))
    else:
        model, stream = open_stream(files, None, lambda dtype: dtype)
        datamodule.trainer = StubTrainer(run_dir, model, residency=stream)
    return datamodule


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes that the choice sees."""
    free = {"cpu": 1 << 40}
    monkeypatch.setattr(moeq.checkpoint.free_memory, "free_bytes", lambda device: free[device.type])
    return free


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writers that were opened."""
    names: list[str] = []
    use_writer = moeq.sampling.open_writer.use_writer

    def noting(adapter: Any, writer: str, *rest: Any) -> Any:
        names.append(writer)
        return use_writer(adapter, writer, *rest)

    monkeypatch.setattr(moeq.sampling.open_writer, "use_writer", noting)
    return names


def made(datamodule: EBSSDataModule) -> Tensor:
    """The sequences of a run that is accepted, which has their report."""
    ids_NL = datamodule.calibration_ids()
    datamodule.begin()
    return ids_NL


def report(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "calibration" / "report.json").read_text())
    return found


def little(datamodule: EBSSDataModule) -> int:
    """Bytes in which the model at 4 bits fits, and nothing else."""
    sizes = datamodule._sizes()
    return sizes.packed["packed4"] + sizes.block + sizes.work


@pytest.mark.parametrize("writer", ["original", "packed4"])
def test_sets_of_a_streamed_model_are_those_of_one_in_memory(tmp_path: Path, files: Path, writer: str) -> None:
    away = attached(tmp_path / "away", files, writer=writer)
    here = attached(tmp_path / "here", writer=writer)
    assert torch.equal(made(away), made(here))
    both = [report(tmp_path / name) for name in ("away", "here")]
    assert both[0]["sampled"] == both[1]["sampled"]
    assert both[0]["writer"] == writer
    assert away.trainer.lightning_module.run.fallbacks == []


def test_the_original_writes_where_it_fits(tmp_path: Path, files: Path, room: dict[str, int], opened: list) -> None:
    datamodule = attached(tmp_path, files)
    made(datamodule)
    assert opened == ["original"]
    assert datamodule.trainer.lightning_module.run.fallbacks == []
    assert all(parameter.is_meta for parameter in datamodule.trainer.lightning_module.model.model.layers.parameters())


def test_a_rounded_writer_is_a_fallback_and_is_kept(
    tmp_path: Path, files: Path, room: dict[str, int], opened: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(datamodules.ebss, "rank_zero_info", said.append)
    datamodule = attached(tmp_path, files)
    room["cpu"] = little(datamodule)
    ids_NL = made(datamodule)
    (fallback,) = datamodule.trainer.lightning_module.run.fallbacks
    assert fallback.reason == "written by the model rounded to 4 bits"
    assert "rounded to 4 bits, as it does not fit" in said[0]
    assert report(tmp_path)["writer"] == "packed4"
    # A run that goes on, with more memory than before: the same sequences, and nothing is opened.
    room["cpu"] = 1 << 40
    again = attached(tmp_path, files)
    assert torch.equal(made(again), ids_NL)
    assert again.trainer.lightning_module.run.fallbacks == [fallback]
    assert opened == ["packed4"]


def test_where_nothing_fits_the_numbers_are_named_and_a_set_from_elsewhere_is_taken(
    tmp_path: Path, files: Path, room: dict[str, int], opened: list
) -> None:
    cache = str(tmp_path / "cache")
    room["cpu"] = 1000
    with pytest.raises(ValueError, match=r"the model cannot write its calibration data here: .*GivenIdsDataModule"):
        made(attached(tmp_path / "poor", files, cache_dir=cache))
    assert not list((tmp_path / "poor").rglob("*.safetensors"))
    room["cpu"] = 1 << 40
    ids_NL = made(attached(tmp_path / "rich", files, cache_dir=cache))
    room["cpu"] = 1000
    assert torch.equal(made(attached(tmp_path / "poor", files, cache_dir=cache)), ids_NL)
    assert opened == ["original"]
    assert report(tmp_path / "poor") == report(tmp_path / "rich")


def test_text_is_scored_by_the_writer_while_it_is_there(tmp_path: Path, files: Path, opened: list) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    run = attached(tmp_path / "run", files, writer="packed8", compare_text=str(text))
    made(run)
    assert opened == ["packed8"]
    first = report(tmp_path / "run")
    made(attached(tmp_path / "run", files, writer="packed8", compare_text=str(text)))
    assert opened == ["packed8"]
    assert report(tmp_path / "run") == first
    # Another text of a set that is there.
    text.write_text("Sphinx of black quartz, judge my vow. " * 9)
    made(attached(tmp_path / "run", files, writer="packed8", compare_text=str(text)))
    assert opened == ["packed8", "packed8"]
    assert report(tmp_path / "run")["sampled"] == first["sampled"]
    assert report(tmp_path / "run")["text"] != first["text"]


def test_a_text_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path, opened: list) -> None:
    with pytest.raises(ValueError, match=r"no file no.txt in folder"):
        made(attached(tmp_path, compare_text=str(tmp_path / "no.txt")))
    assert opened == []


def test_ranks_of_a_machine_share_its_memory(tmp_path: Path, files: Path, room: dict[str, int]) -> None:
    datamodule = attached(tmp_path, files)
    datamodule.trainer.world_size, datamodule.trainer.num_nodes = 8, 2
    assert datamodule._sizes().host_free == (1 << 40) // 4
