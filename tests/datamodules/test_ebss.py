import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import moeq.sampling.parts
from datamodules.ebss import EBSSDataModule
from moeq.models.adapter import Adapter
from moeq.sampling.candidates import first_token_candidates
from moeq.sampling.next_token import score_sequences
from moeq.sampling.store import load_sampled
from tests.datamodules.stub import StubTrainer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

SMALL = {"mode": "stochastic", "num_sequences": 6, "length": 16, "branches": 2, "sequences_at_once": 4, "batch_size": 2}


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("qwen2_moe")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of every search that is run."""
    calls: list[int] = []
    search = moeq.sampling.parts.search

    def counting(next_token: Any, spec: Any, first_N: Tensor, *rest: Any) -> Any:
        calls.append(len(first_N))
        return search(next_token, spec, first_N, *rest)

    monkeypatch.setattr(moeq.sampling.parts, "search", counting)
    return calls


def attached(run_dir: Path, model: nn.Module, rank: int = 0, world_size: int = 1, **settings: Any) -> EBSSDataModule:
    datamodule = EBSSDataModule(**{**SMALL, **settings})
    datamodule.trainer = StubTrainer(run_dir, model, rank, world_size)
    return datamodule


def ids_file(run_dir: Path) -> Path:
    (path,) = (run_dir / "calibration").glob("ebss-*.safetensors")
    return path


def test_defaults_are_those_of_the_paper_with_the_corpus_mode() -> None:
    spec = EBSSDataModule().spec
    assert (spec.num_sequences, spec.length, spec.branches, spec.tau, spec.mode) == (128, 512, 4, 1.2, "corpus")


def test_first_tokens_are_distinct_and_never_special(tmp_path: Path, model: nn.Module) -> None:
    ids_NL = attached(tmp_path, model, num_sequences=200, length=6).calibration_ids()
    first = ids_NL[:, 0].tolist()
    assert len(set(first)) == 200
    assert 0 not in first
    assert max(first) < len(tiny_tokenizer())
    assert first_token_candidates(model, tiny_tokenizer()).tolist() == list(range(1, 257))
    with pytest.raises(ValueError, match=r"num_sequences \(300\) must not exceed the 256 tokens"):
        attached(tmp_path, model, num_sequences=300).calibration_ids()


def test_ids_and_report_are_in_the_run_folder(tmp_path: Path, model: nn.Module) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    datamodule = attached(tmp_path, model, compare_text=str(text))
    ids_NL = datamodule.calibration_ids()
    assert not (tmp_path / "calibration" / "report.json").exists()  # of a run that is not accepted yet
    datamodule.begin()
    sampled = load_sampled(ids_file(tmp_path))
    nll_N, counts_NLE = score_sequences(model, ids_NL)
    assert torch.equal(sampled.ids_NT, ids_NL)
    assert torch.equal(sampled.counts_NLE, counts_NLE)
    report = json.loads((tmp_path / "calibration" / "report.json").read_text())
    assert report["sampled"]["nll_mean"] == pytest.approx(float(nll_N.mean()) / 15, rel=1e-4)
    assert report["sampled"]["tokens"] == report["text"]["tokens"] == 96
    assert report["sampled"].keys() == report["text"].keys()
    assert report["settings"]["mode"] == "stochastic"
    assert report["samples"] == tiny_tokenizer().batch_decode(ids_NL[:3])


def test_a_restart_reads_the_ids_back(tmp_path: Path, model: nn.Module, searches: list[int]) -> None:
    first = attached(tmp_path, model).calibration_ids()
    assert searches == [4, 2]
    assert torch.equal(attached(tmp_path, model).calibration_ids(), first)
    assert searches == [4, 2]


def test_more_ranks_than_batches_are_refused_before_anything_is_sampled(
    tmp_path: Path, model: nn.Module, searches: list[int]
) -> None:
    with pytest.raises(ValueError, match="6 sequences in batches of 2 are 3 batches, fewer than the 4 ranks"):
        attached(tmp_path, model, world_size=4).calibration_ids()
    assert searches == []
    assert not list(tmp_path.rglob("calibration"))


def test_the_set_is_named_before_it_is_sampled(tmp_path: Path, model: nn.Module, searches: list[int]) -> None:
    datamodule = attached(tmp_path, model)
    key = datamodule.data_key()
    assert searches == []
    datamodule.calibration_ids()
    assert ids_file(tmp_path).stem == key
    assert attached(tmp_path, model, seed=1).data_key() != key


def test_runs_share_a_cache_folder(tmp_path: Path, model: nn.Module, searches: list[int]) -> None:
    settings = {"cache_dir": str(tmp_path / "cache")}
    first = attached(tmp_path / "a", model, **settings).calibration_ids()
    taking = attached(tmp_path / "b", model, **settings)
    second = taking.calibration_ids()
    taking.begin()
    assert searches == [4, 2]
    assert torch.equal(first, second)
    assert ids_file(tmp_path / "a").read_bytes() == ids_file(tmp_path / "b").read_bytes()
    assert (tmp_path / "b" / "calibration" / "report.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_other_settings_or_weights_make_other_ids(tmp_path: Path, model: nn.Module, searches: list[int]) -> None:
    attached(tmp_path, model).calibration_ids()
    attached(tmp_path, model, seed=1).calibration_ids()
    attached(tmp_path, model, tau=0.5).calibration_ids()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    attached(tmp_path, model).calibration_ids()
    assert len(searches) == 8
    assert len(list((tmp_path / "calibration").glob("ebss-*.safetensors"))) == 4


def test_ids_are_made_before_quantization_and_kept(tmp_path: Path, model: nn.Module, searches: list[int]) -> None:
    datamodule = attached(tmp_path, model)
    before = [batch["input_ids"] for batch in datamodule.train_dataloader()]
    with torch.no_grad():
        next(model.parameters()).zero_()
    after = [batch["input_ids"] for batch in datamodule.train_dataloader()]
    assert torch.equal(torch.cat(before), torch.cat(after))
    assert len(searches) == 2


def as_ranks(world_size: int, run: Callable[[int, Callable[[str], object]], Tensor]) -> list[Tensor]:
    """What ``run(rank, barrier)`` gives on every rank; ranks are threads that meet at the barriers."""
    meeting = threading.Barrier(world_size, timeout=60)

    def one(rank: int) -> Tensor:
        try:
            return run(rank, lambda _: bool(meeting.wait()))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        ranks = [pool.submit(one, rank) for rank in range(world_size)]
    if errors := [error for rank in ranks if (error := rank.exception())]:
        # That of the rank that failed, not of those that then wait for it in vain.
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [rank.result() for rank in ranks]


@pytest.mark.parametrize("mode", ["stochastic", "corpus"])
def test_ranks_share_the_work_and_every_sequence_is_served_once(tmp_path: Path, mode: str) -> None:
    # Not in the threads: making a model sets the default dtype of the process for a moment, and its folder is written.
    datamodules = [attached(tmp_path, tiny_model("qwen2_moe"), rank, 2, mode=mode) for rank in range(2)]

    def run(rank: int, barrier: Callable[[str], object]) -> Tensor:
        datamodules[rank].trainer.strategy.barrier = barrier
        return datamodules[rank].calibration_ids()

    first, second = as_ranks(2, run)
    assert torch.equal(first, second)
    assert len(set(map(tuple, first.tolist()))) == 6
    shares = [torch.cat([batch["input_ids"] for batch in datamodules[rank].train_dataloader()]) for rank in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == sorted(first.tolist())
    assert not list(tmp_path.rglob("*.parts"))
    if mode == "stochastic":
        alone = attached(tmp_path / "alone", tiny_model("qwen2_moe")).calibration_ids()
        assert torch.equal(alone, first)


def test_parts_stay_until_the_slowest_rank_has_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodules = [attached(tmp_path, tiny_model("qwen2_moe"), rank, 2) for rank in (0, 1)]
    load_part, slow = moeq.sampling.parts.load_part, threading.local()
    first_is_done = threading.Event()

    def load_late(path: Path) -> Any:
        if hasattr(slow, "waits"):
            assert first_is_done.wait(timeout=60)
        return load_part(path)

    def run(rank: int, barrier: Callable[[str], object]) -> Tensor:
        def meet(name: str) -> None:
            if rank == 0 and name == "moeq_ebss":
                first_is_done.set()
            barrier(name)

        if rank == 1:
            slow.waits = True
        datamodules[rank].trainer.strategy.barrier = meet
        return datamodules[rank].calibration_ids()

    monkeypatch.setattr(moeq.sampling.parts, "load_part", load_late)
    first, second = as_ranks(2, run)
    assert torch.equal(first, second)
    assert not list(tmp_path.rglob("*.parts"))


def test_damaged_ids_are_refused(tmp_path: Path, model: nn.Module) -> None:
    attached(tmp_path, model).calibration_ids()
    path = ids_file(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a complete file of sampled sequences .* delete it"):
        attached(tmp_path, model).calibration_ids()


def test_bad_settings_are_named(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"branches \(0\) must be at least 1"):
        EBSSDataModule(branches=0)
    with pytest.raises(ValueError, match=r"sequences_at_once \(0\) must be positive"):
        EBSSDataModule(sequences_at_once=0)
    with pytest.raises(ValueError, match=r"length \(513\) must not exceed the 512 positions of the model"):
        attached(tmp_path, model, length=513).calibration_ids()


def test_a_trainer_feeds_the_batches(tmp_path: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    class Recorder(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.__dict__["model"] = model
            self.tokenizer, self.run_dir, self.seen = tiny_tokenizer(), tmp_path, []
            self.adapter = Adapter(model)
            self.save_hyperparameters({"name": str(save_tiny("qwen2_moe", tmp_path / "model"))})

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.seen.append(batch["input_ids"])

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            raise AssertionError("validation inside fit is off")

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return []

    recorder, datamodule = Recorder(), EBSSDataModule(**SMALL)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        limit_val_batches=0, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=datamodule)
    assert torch.equal(torch.cat(recorder.seen), datamodule.calibration_ids().repeat(2, 1))
    assert "EBSS (stochastic): 100%" in capsys.readouterr().err


def test_corpus_mode_survives_a_kill_and_reports_and_logs(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, calls = moeq.sampling.parts.search_corpus, []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError("killed")
        return search(*args)

    expected = attached(tmp_path / "whole", model, mode="corpus").calibration_ids()
    monkeypatch.setattr(moeq.sampling.parts, "search_corpus", dying)
    with pytest.raises(InterruptedError):
        attached(tmp_path / "killed", model, mode="corpus").calibration_ids()
    assert len(list((tmp_path / "killed").rglob("*.parts/*.safetensors"))) == 1
    logged: list[dict[str, float]] = []
    datamodule = attached(tmp_path / "killed", model, mode="corpus")
    datamodule.trainer.logger = SimpleNamespace(log_metrics=lambda metrics, step=None: logged.append(metrics))
    assert torch.equal(datamodule.calibration_ids(), expected)
    datamodule.begin()
    assert len(calls) == 3
    report = json.loads((tmp_path / "killed" / "calibration" / "report.json").read_text())
    assert report["decisions"]["redrawn_sequences"] == 0.0
    assert len(report["sampled"]["effective_samples_per_expert"]) == 2
    names = set().union(*logged)
    assert {
        "ebss_sampled/sigma_slot_share",
        "ebss_decisions/steps_changed_by_balance",
        "ebss_steps/balance_term_range",
    } < names


def test_a_cache_folder_with_other_files_is_refused(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.docx").touch()
    with pytest.raises(ValueError, match=r"holds 1 files that are not sampled sequences, such as thesis.docx; choose"):
        attached(tmp_path / "run", model, cache_dir=str(tmp_path / "cache")).calibration_ids()
    with pytest.raises(ValueError, match=r"cache_dir .* is a file; choose a folder"):
        attached(tmp_path / "run", model, cache_dir=str(tmp_path / "cache" / "thesis.docx")).calibration_ids()


def test_more_branches_than_tokens_are_refused_by_name(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"branches \(265\) must not exceed the vocabulary \(264\)"):
        attached(tmp_path, model, branches=265).calibration_ids()
