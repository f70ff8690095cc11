"""When the callback decides: at the start, after the survey, or not at all in a run that continues."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.bit_allocation import BitAllocation
from callbacks.expert_usage import ExpertUsage
from callbacks.rtn import RTN
from callbacks.survey import Survey
from moeq.allocation.constraints import Floor
from moeq.allocation.evidence import Evidence, Promise
from moeq.allocation.plan import Choice
from moeq.disk.atomic import write_json
from moeq.module import MoEQuantModule
from tests.tiny import save_tiny

ALLOCATE: dict[str, Any] = {"method": "allocate", "cost": "fisher", "budget": 2.6, "choices": [2, 4]}


class Batches(L.LightningDataModule):
    """One batch of ids."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader([{"input_ids": torch.arange(1, 9)}], batch_size=1)


class StubSurvey(L.Callback):
    """Makes up costs at the end of the last pass of a survey: down projections are expensive."""

    affects_weights = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.run.needs.survey = True
        pl_module.run.promise = Promise(costs=("fisher",), choices=(Choice(2, 16), Choice(4, 16)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.current_pass.kind == "survey":
            pl_module.run.evidence = evidence(pl_module)


class StopAtBlock(L.Callback):
    """Ends a run as an error would, when a block is reached."""

    affects_weights = False

    def __init__(self, block: int) -> None:
        self.block = block

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.current_pass.kind == "calibrate" and pl_module.current_pass.block == self.block:
            raise RuntimeError("stopped")


class NoPass(L.Callback):
    """Fails where a pass starts."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise AssertionError("a pass was started")


def evidence(module: MoEQuantModule) -> Evidence:
    costs = {
        w.name: {Choice(bits, 16): (10 if w.linear == "down_proj" else 1) * 4.0**-bits for bits in (2, 4)}
        for w in module.weight_shapes()
    }
    return Evidence(costs={"fisher": costs})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("allocation") / "model", dtype=torch.float32)


def fit(model: Path, folder: Path, *callbacks: L.Callback, **options: Any) -> MoEQuantModule:
    given = {"bits": 2, "group_size": 16, "sequential": "block", "clip_search": False, **options}
    module = MoEQuantModule(name=str(model), **given)
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), logger=False, max_epochs=-1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Batches())
    return module


pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def widths(module: MoEQuantModule) -> dict[str, int]:
    return {name: bits for name, (bits, *_) in module.walk.resume.grids.items()}


def test_a_plan_from_a_survey_is_made_before_anything_is_quantized(model: Path, tmp_path: Path) -> None:
    module = fit(model, tmp_path, StubSurvey(), BitAllocation(**ALLOCATE), RTN())
    data = json.loads((tmp_path / "allocation.json").read_text())
    assert widths(module) == {name: grid["bits"] for name, grid in data["weights"].items()}
    assert data["code_bits"] <= 2.6
    assert data["allocation"]["runtime"] == "research"
    down = [bits for name, bits in widths(module).items() if name.endswith("down_proj")]
    others = [bits for name, bits in widths(module).items() if not name.endswith("down_proj")]
    assert sum(down) / len(down) > sum(others) / len(others)
    assert "predicted error" in (tmp_path / "allocation.md").read_text()


def test_a_run_that_continues_keeps_the_plan_of_its_survey(model: Path, tmp_path: Path) -> None:
    whole = fit(model, tmp_path / "whole", StubSurvey(), BitAllocation(**ALLOCATE), RTN())
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model, tmp_path / "run", StubSurvey(), BitAllocation(**ALLOCATE), RTN(), StopAtBlock(1))
    written = (tmp_path / "run/allocation.json").read_bytes()
    module = fit(model, tmp_path / "run", StubSurvey(), BitAllocation(**ALLOCATE), RTN())
    assert [(each.kind, each.block) for each in module.walk.schedule] == [("advance", 0), ("calibrate", 1)]
    assert widths(module) == widths(whole)
    assert set(widths(module).values()) == {2, 4}
    assert (tmp_path / "run/allocation.json").read_bytes() == written
    assert (tmp_path / "whole/allocation.json").read_bytes() == written


def test_editing_the_plan_of_finished_blocks_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model, tmp_path, StubSurvey(), BitAllocation(**ALLOCATE), RTN(), StopAtBlock(1))
    path = tmp_path / "allocation.json"
    data = json.loads(path.read_text())
    name = "model.layers.0.self_attn.q_proj"
    data["weights"][name]["bits"] = 7
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"{name} was quantized to [24] bits .*before .* now says quantized to 7"):
        fit(model, tmp_path, StubSurvey(), BitAllocation(**ALLOCATE), RTN())


def test_another_allocation_in_the_same_folder_is_refused(model: Path, tmp_path: Path) -> None:
    fit(model, tmp_path, BitAllocation(attention=4), RTN())
    with pytest.raises(ValueError, match="holds blocks of a run with another configuration"):
        fit(model, tmp_path, BitAllocation(rules=[{"rule": "attention", "bits": 3}]), RTN())


def test_a_survey_of_an_earlier_run_needs_none_in_this_one(model: Path, tmp_path: Path) -> None:
    module = MoEQuantModule(name=str(model))
    module.configure_model()

    write_json(tmp_path / "survey.json", evidence(module).to_json())
    surveyed = BitAllocation(**ALLOCATE, survey=str(tmp_path / "survey.json"))
    later = fit(model, tmp_path / "later", surveyed, RTN())
    assert all(each.kind != "survey" for each in later.walk.schedule)
    first = fit(model, tmp_path / "first", StubSurvey(), BitAllocation(**ALLOCATE), RTN())
    assert widths(later) == widths(first)


def test_rules_without_evidence_are_decided_at_the_start(model: Path, tmp_path: Path) -> None:
    rules = [{"rule": "attention", "bits": 4}, {"rule": "random_experts", "num": 1, "seed": 0, "bits": 3}]
    module = fit(model, tmp_path, BitAllocation(shared=4, rules=rules), RTN())
    bits = widths(module)
    assert {bits[name] for name in bits if "self_attn" in name or "shared_expert" in name} == {4}
    assert sum(bits[name] == 3 for name in bits) == 2 * 3
    assert {"version", "weights", "rules"} < set(json.loads((tmp_path / "allocation.json").read_text()))


def test_a_plan_for_a_runtime_is_logged_and_written_at_the_size_of_its_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("callbacks.bit_allocation.rank_zero_info", lines.append)
    allocation = BitAllocation(runtime="llama.cpp", budget=4.5, budget_unit="average_bits")
    fit(model, tmp_path, allocation, RTN(), bits=3, group_size=32, symmetric=True)
    data = json.loads((tmp_path / "allocation.json").read_text())
    assert data["average_bits"] == 3.5
    assert data["file"] | {"average_bits": 4.5, "carrier": "exact"} == data["file"]
    assert data["file"]["types"] == {"Q4_0": len(data["weights"])}
    assert len(lines) == 1
    assert "3.500 with scales and zero points" in lines[0]
    assert "in files for llama.cpp (exact) 4.500" in lines[0]


def test_grids_that_a_runtime_does_not_read_are_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj: llama.cpp cannot read 2g16: gguf has no type that holds 2 bits"):
        fit(model, tmp_path, BitAllocation(runtime="llama.cpp"), RTN(), NoPass())
    assert not (tmp_path / "allocation.json").exists()


def test_needing_a_survey_that_nothing_makes_is_an_error_at_the_start(model: Path, tmp_path: Path) -> None:
    rules = [{"rule": "most_used_experts", "num": 1, "bits": 4}]
    # A survey of expert usage is none that an allocation can read.
    for before in ([], [ExpertUsage(survey=True)]):
        for callback in (BitAllocation(**ALLOCATE), BitAllocation(rules=rules)):
            with pytest.raises(ValueError, match=r"put Survey before BitAllocation, or give survey: PATH"):
                fit(model, tmp_path, *before, callback, RTN())
    with pytest.raises(ValueError, match=r"put Survey before"):
        fit(model, tmp_path, BitAllocation(**ALLOCATE), Survey(choices=[2, 4]), RTN())
    assert not (tmp_path / "allocation.json").exists()


@pytest.mark.parametrize(
    ("survey", "allocation", "remedy"),
    [
        ({"costs": ["hessian"]}, ALLOCATE, "add fisher to costs of the callback Survey"),
        ({"choices": [2, 3]}, ALLOCATE, r"no 4g16 for .*; add it to choices of the callback Survey"),
        (
            {"scores": ["kurtosis"]},
            {"rules": [{"rule": "top_scored", "score": "outlier", "num": 1, "bits": 4}]},
            r"no score 'outlier' .* add it to scores of the callback Survey",
        ),
        (
            {},
            {"rules": [{"rule": "least_similar_blocks", "by": "predicted", "num": 1, "bits": 4}]},
            r"set predictor: true in the callback Survey",
        ),
    ],
)
def test_what_the_survey_was_not_asked_for_is_an_error_before_the_first_pass(
    survey: dict[str, Any], allocation: dict[str, Any], remedy: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=remedy):
        fit(model, tmp_path, Survey(**survey), BitAllocation(**allocation), RTN(), NoPass())


def test_a_survey_of_another_model_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    module = MoEQuantModule(name=str(model))
    module.configure_model()

    data = evidence(module).to_json()
    del data["costs"]["fisher"]["model.layers.1.self_attn.o_proj"]
    write_json(tmp_path / "survey.json", data)
    given = BitAllocation(attention=4, survey=str(tmp_path / "survey.json"))
    with pytest.raises(ValueError, match=r"survey\.json: the survey lacks model\.layers\.1\.self_attn\.o_proj"):
        fit(model, tmp_path, given, RTN())


def test_a_survey_that_no_step_needs_is_said_to_be_so(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = {"costs": [], "choices": [2, 4]}
    rules = [{"rule": "most_used_experts", "num": 1, "bits": 4}]
    fit(model, tmp_path / "needed", Survey(**free), BitAllocation(rules=rules))
    assert "No step" not in caplog.text
    fit(model, tmp_path / "spare", Survey(**free), BitAllocation(attention=4))
    assert caplog.text.count("No step of this run needs its survey") == 1


def test_mistakes_in_the_arguments_show_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="already states all bits"):
        BitAllocation(plan="allocation.json", attention=4)
    with pytest.raises(ValueError, match="must be one of"):
        BitAllocation(rules=[{"rule": "best", "bits": 4}])
    with pytest.raises(ValueError, match="floors belong to the allocator"):
        BitAllocation(floors=[Floor(4, 1)])
