from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.gptq import GPTQ
from callbacks.hessian_calibration import HessianCalibration
from callbacks.survey import Survey
from moeq.allocation.evidence import Evidence, read_evidence
from moeq.allocation.plan import Choice
from moeq.module import MoEQuantModule
from moeq.survey.survey_spec import SurveySpec
from moeq.survey.surveyor import survey_model
from tests.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
COSTS = ("fisher", "gemq", "block_output")


class Batches(L.LightningDataModule):
    """Three batches of random ids, with padding at the end of one row where asked for."""

    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.ids = torch.randint(1, 257, (6, 12), generator=torch.Generator().manual_seed(1))
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask[3, 7:] = 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(self.ids, self.mask, strict=True)]
        return DataLoader(rows, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("survey") / "model", dtype=torch.float32)


def fit(
    model: Path, run: Path, callback: Survey, padded: bool = False, steps: bool = False, **settings: Any
) -> MoEQuantModule:
    module = MoEQuantModule(name=str(model), group_size=16, **settings)
    trainer = L.Trainer(
        default_root_dir=run, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=-1,
        callbacks=[callback, HessianCalibration(), GPTQ()] if steps else [callback],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Batches(padded))
    return module


def same(first: Evidence, second: Evidence) -> None:
    for field in ("costs", "scores"):
        for name, table in getattr(second, field).items():
            for weight, value in table.items():
                assert getattr(first, field)[name][weight] == pytest.approx(value, rel=1e-4, abs=1e-12)
    for path, counts in second.tokens.items():
        assert first.tokens[path].tolist() == counts.tolist()
    torch.testing.assert_close(first.similarity_L, second.similarity_L, rtol=1e-5, atol=1e-6)


def test_a_run_finds_what_a_survey_of_the_model_alone_finds(model: Path, tmp_path: Path) -> None:
    module = fit(model, tmp_path, Survey(costs=COSTS, scores=("kurtosis",), choices=[2, 4]))
    assert [each.kind for each in module.walk.schedule[:2]] == ["survey", "survey"]
    spec = SurveySpec(
        costs=COSTS, scores=("kurtosis",), choices=(Choice(2, 16), Choice(4, 16)), grid=module.grid,
    )  # fmt: skip
    alone = survey_model(module.model, Batches(False).ids.split(2), spec)
    assert module.run.evidence is not None
    same(module.run.evidence, alone)
    same(read_evidence(tmp_path / "survey.json"), alone)


def test_padding_does_not_count(model: Path, tmp_path: Path) -> None:
    evidence = fit(model, tmp_path, Survey(costs=COSTS, choices=[4]), padded=True).run.evidence
    assert evidence is not None
    num_tokens = int(Batches(True).mask.sum())
    assert [int(counts.sum()) for counts in evidence.tokens.values()] == [2 * num_tokens] * 2


def test_a_streamed_run_finds_the_same_to_the_last_bit(model: Path, tmp_path: Path) -> None:
    def found(run: Path, **settings: Any) -> Any:
        callback = Survey(costs=[*COSTS, "fisher_kl", "alphaq"], scores=["kurtosis"], choices=[2, 4])
        module = fit(model, run, callback, padded=True, **settings)
        assert module.run.evidence is not None
        return module.run.evidence.to_json()

    in_memory = found(tmp_path / "memory", placement="memory")
    assert found(tmp_path / "stream", placement="stream", hidden_gib=0.0) == in_memory


def test_a_resumed_run_reads_the_survey_of_its_first_part(model: Path, tmp_path: Path) -> None:
    first = fit(model, tmp_path, Survey(choices=[2, 4]), steps=True)
    (tmp_path / "blocks" / "block_001.safetensors").unlink()
    second = fit(model, tmp_path, Survey(choices=[2, 4]), steps=True)
    assert not any(each.kind == "survey" for each in second.walk.schedule)
    assert first.run.evidence is not None
    assert second.run.evidence is not None
    same(second.run.evidence, first.run.evidence)


def test_the_survey_sees_the_original_weights_although_the_run_quantizes(model: Path, tmp_path: Path) -> None:
    alone = fit(model, tmp_path / "alone", Survey(choices=[2])).run.evidence
    before = fit(model, tmp_path / "before", Survey(choices=[2]), steps=True).run.evidence
    assert alone is not None
    assert before is not None
    same(before, alone)


@pytest.mark.parametrize(("settings", "complaint"), [({"costs": ["loss"]}, "fisher"), ({"choices": [9]}, "bits")])
def test_a_mistake_ends_the_run_before_its_first_pass(
    settings: dict[str, list[object]], complaint: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit(model, tmp_path, Survey(**settings))
