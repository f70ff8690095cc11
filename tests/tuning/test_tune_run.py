"""Tuning brings a quantized model nearer to the original, keeps grids, and is finished once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.disk.waiting import WaitingStates
from moeq.fit.block_files import read_block
from moeq.models.adapter import Adapter
from moeq.tuning.originals import read_batch
from moeq.tuning.tune_run import tune
from moeq.tuning.tuning_spec import TuningSpec
from tests.tiny import tiny_model
from tests.tuning.tuned import SPEC, quantized_run, unseen

FAST = replace(SPEC, scale_rate=0.002, level_rate=0.06, norm_rate=0.002, router_rate=0.002)


def tuned(folder: Path, spec: TuningSpec = FAST) -> tuple[Adapter, Any, dict[str, Any]]:
    adapter = Adapter(tiny_model("qwen2_moe"))
    run, resume, place = quantized_run(adapter, folder)
    record = tune(adapter, run, resume, place, spec, WaitingStates(0, folder), unseen)
    return adapter, resume, record


@torch.no_grad()
def reference_loss(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean KL of the model as it is to what the head makes of the original's hidden states."""
    total = count = 0.0
    for ids_BT, last_BTD in batches:
        wanted = model.lm_head(model.model.norm(last_BTD)).double().log_softmax(-1)
        found = model(input_ids=ids_BT, use_cache=False).logits.double().log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum())
        count += ids_BT.numel()
    return total / count


def test_the_model_that_is_exported_is_as_near_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out: list[Any] = []
    clear = "moeq.tuning.tuned_blocks.TuningFolder.finish"

    def finish(place: Any, record: Any) -> None:
        held_out.extend(tuple(map(torch.clone, read_batch(place.originals, n))) for n in range(FAST.num_held_out))

    monkeypatch.setattr(clear, finish)
    adapter, _, record = tuned(tmp_path)
    assert record["kept"]
    assert record["after"] < record["before"]
    assert reference_loss(adapter.model, held_out) == pytest.approx(record["after"], rel=1e-3)
    assert 0 <= record["codes_changed"] < 0.5
    assert 0 < record["fewest_tokens"] < record["tokens"]


def test_grids_stay_and_the_files_it_began_from_as_well(tmp_path: Path) -> None:
    _, resume, record = tuned(tmp_path)
    assert record["kept"]
    for block in range(2):
        solved, result = read_block(tmp_path, block), resume.quantized(block)
        assert result.records["grids"] == solved.records["grids"]
        assert any(not torch.equal(result[name].scale_OG, solved[name].scale_OG) for name in solved)
        assert set(result.changed) == set(resume.run.changed) & set(result.changed) != set()
        assert all("tuned end to end" in resume.run.reasons[name] for name in result.changed)


def test_a_tuning_that_does_not_help_changes_nothing(tmp_path: Path) -> None:
    _, resume, record = tuned(tmp_path, replace(FAST, level_rate=0.9, scale_rate=0.9))
    assert not record["kept"]
    assert record["after"] == record["before"]
    assert not resume.run.changed
    solved = read_block(tmp_path, 1)
    assert all(torch.equal(resume.quantized(1)[name].codes_OI, solved[name].codes_OI) for name in solved)


def test_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    adapter, resume, record = tuned(tmp_path)
    from moeq.fit.resume import Resume
    from moeq.fit.run import Run
    from moeq.tuning.tuned_blocks import TuningFolder

    place = TuningFolder(tmp_path / "tuning", {"model": "tiny"})
    assert not place.originals.exists()
    again = Resume(Adapter(tiny_model("qwen2_moe")), Run(plan=resume.run.plan), tmp_path, place.fingerprint)
    again.load(lambda _: None)
    found = tune(again.adapter, again.run, again, place, FAST, WaitingStates(0, tmp_path), unseen)
    assert found == {**record, "checks": [list(check) for check in record["checks"]]}
    for (name, one), (_, other) in zip(
        adapter.blocks.named_parameters(), again.adapter.blocks.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
