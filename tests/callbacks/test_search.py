"""A run that searches: Survey and BitAllocation together, in memory, streamed, ended and taken up again."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.bit_allocation import BitAllocation
from callbacks.rtn import RTN
from callbacks.survey import Survey
from moeq.allocation.outer import SearchSpec
from moeq.allocation.plan import Choice
from moeq.module import MoEQuantModule
from moeq.survey import assembled
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from tests.processes import run
from tests.test_main import QUIET
from tests.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
SEARCH: dict[str, Any] = {"method": "allocate", "cost": "fisher", "budget": 2.6, "choices": [2, 3, 4]}


class Batches(L.LightningDataModule):
    """Three batches of random ids."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(1))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader([{"input_ids": row} for row in self.ids], batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("search") / "model", dtype=torch.float32)


def fit(model: Path, folder: Path, *callbacks: L.Callback, **options: Any) -> MoEQuantModule:
    module = MoEQuantModule(name=str(model), bits=2, group_size=16, sequential="block", clip_search=False, **options)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), logger=False, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Batches())
    return module


def steps(num_batches: int = 1) -> list[L.Callback]:
    survey = Survey(choices=[2, 3, 4], solver="rtn", num_gradient_batches=2)
    return [survey, BitAllocation(**SEARCH, search=SearchSpec(num_rounds=2, num_batches=num_batches)), RTN()]


def test_a_run_searches_on_batches_that_its_survey_left_out_and_ends_with_what_it_found(
    model: Path, tmp_path: Path
) -> None:
    module = fit(model, tmp_path, *steps())
    data = json.loads((tmp_path / "allocation.json").read_text())
    found = {name: bits for name, (bits, *_) in module.walk.resume.grids.items()}
    assert found == {name: grid["bits"] for name, grid in data["weights"].items()}
    assert data["code_bits"] <= 2.6
    assert 0 < data["search"]["kl_after"] <= data["search"]["kl_before"]
    assert module.run.judge is None
    # Of three batches the last is left out.
    assert module.run.evidence is not None
    assert {int(tokens.sum()) for tokens in module.run.evidence.tokens.values()} == {2 * 2 * 12 * 2}
    choices = tuple(Choice(bits, 16) for bits in (2, 3, 4))
    spec = SurveySpec(choices=choices, grid=module.grid, solver="rtn", num_gradient_batches=2)
    original = MoEQuantModule(name=str(model))
    original.configure_model()
    alone = survey_model(original.model, Batches().ids[:4].split(2), spec)
    for name, row in alone.costs["fisher"].items():
        assert module.run.evidence.costs["fisher"][name] == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_streamed_and_taken_up_again_it_finds_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(model, tmp_path / "memory", *steps())
    fit(model, tmp_path / "stream", *steps(), placement="stream", hidden_gib=0.0)
    expected = (tmp_path / "memory/allocation.json").read_bytes()
    assert (tmp_path / "stream/allocation.json").read_bytes() == expected
    # Ended in its second round, it measures the rest alone.
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("moeq.survey.remembered.RememberingJudge.measure", stopping(after=2))
        with pytest.raises(RuntimeError, match="stopped"):
            fit(model, tmp_path / "ended", *steps())
    known = json.loads((tmp_path / "ended/search.json").read_text())
    measure = assembled.AssembledModels.measure
    monkeypatch.setattr(
        assembled.AssembledModels, "measure",
        lambda self, plans, show: asked.append(len(plans)) or measure(self, plans, show),  # type: ignore[func-returns-value]
    )  # fmt: skip
    fit(model, tmp_path / "ended", *steps())
    assert (tmp_path / "ended/allocation.json").read_bytes() == expected
    whole = json.loads((tmp_path / "ended/search.json").read_text())
    assert sum(asked) == len(whole["measured"]) - len(known["measured"]) < len(whole["measured"])


def stopping(after: int) -> Any:
    """``measure`` of a judge that ends the run when it is asked for the last time."""
    from moeq.survey.remembered import RememberingJudge

    whole, calls = RememberingJudge.measure, []

    def measure(self: RememberingJudge, plans: Any) -> list[float]:
        calls.append(len(plans))
        if len(calls) > after:
            raise RuntimeError("stopped")
        return whole(self, plans)

    return measure


@pytest.mark.slow
def test_two_ranks_find_what_one_finds_by_a_command(tmp_path: Path) -> None:
    model = save_tiny("qwen2_moe", tmp_path / "model")
    searched = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        config = {
            "model": {"name": str(model), "bits": 2, "group_size": 16, "clip_search": False},
            "data": {"class_path": "tests.on_ranks.FewTokens", "init_args": {"num_sequences": 8}},
            "trainer": {
                "default_root_dir": str(folder), "devices": devices,
                "callbacks": [
                    {"class_path": "Survey", "init_args": {"choices": [2, 3, 4], "solver": "rtn"}},
                    {
                        "class_path": "BitAllocation",
                        "init_args": {**SEARCH, "search": {"num_rounds": 1, "num_batches": 2}},
                    },
                    {"class_path": "RTN"},
                    {"class_path": "Record"},
                ],
            },
        }  # fmt: skip
        path = tmp_path / f"{devices}.yaml"
        path.write_text(json.dumps(config))
        forked = ["--trainer.strategy=moeq.strategy.UnwrappedDDPStrategy", "--trainer.strategy.start_method=fork"]
        done = run(["fit", "--config", str(path), *QUIET, *(forked if devices > 1 else [])])
        assert done.returncode == 0, done.stderr
        searched.append(json.loads((folder / "allocation.json").read_text())["search"])
    assert searched[1]["kl_before"] == pytest.approx(searched[0]["kl_before"], rel=1e-5)
    assert searched[1]["kl_after"] == pytest.approx(searched[0]["kl_after"], rel=1e-5)


def test_a_search_that_cannot_be_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_batches \(3\) of search .* the data are 3 batches; give more data"):
        fit(model, tmp_path, *steps(num_batches=3))
    unsolved = BitAllocation(**SEARCH | {"budget": 4.0}, search=SearchSpec(), attention=8)
    with pytest.raises(ValueError, match=r"q_proj at 8g16, which the survey does not solve; add 8g16 to choices"):
        fit(model, tmp_path, Survey(choices=[2, 3, 4]), unsolved, RTN())
    assert not (tmp_path / "survey.json").exists()
