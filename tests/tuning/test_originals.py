"""What tuning learns from is what the original makes of the sequences, and is made once."""

from pathlib import Path

import pytest
import torch

from moeq.disk.waiting import WaitingStates
from moeq.models.adapter import Adapter
from moeq.tuning.originals import batch_path, is_recorded, read_batch
from moeq.tuning.prediction import loss_and_gradient
from moeq.tuning.tune_run import prepare_originals
from moeq.tuning.tuned_blocks import TuningFolder
from tests.tiny import tiny_model
from tests.tuning.tuned import SPEC, unseen, written


def recorded(folder: Path, adapter: Adapter) -> TuningFolder:
    place = TuningFolder(folder, {"model": "tiny"})
    prepare_originals(adapter, place, SPEC, written, WaitingStates(0, folder), unseen)
    return place


@torch.no_grad()
def test_the_head_makes_the_predictions_of_the_original_of_it(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    adapter = Adapter(model)
    place = recorded(tmp_path, adapter)
    rows = {tuple(row) for row in written().tolist()}
    for batch in range(SPEC.num_batches):
        ids_BT, last_BTD = read_batch(place.originals, batch)
        assert {tuple(row) for row in ids_BT.tolist()} <= rows
        rows -= {tuple(row) for row in ids_BT.tolist()}
        expected_BTV = model(input_ids=ids_BT, use_cache=False).logits
        torch.testing.assert_close(model.lm_head(model.model.norm(last_BTD)), expected_BTV)  # type: ignore[operator, union-attr]
        loss, gradient = loss_and_gradient(adapter, ids_BT, last_BTD, last_BTD, SPEC)
        assert abs(float(loss)) < 1e-5
        assert float(gradient.abs().max()) < 1e-6
    assert not rows, "a sequence is in no batch"


def test_it_is_made_again_where_it_is_damaged_or_of_another_run(tmp_path: Path) -> None:
    adapter = Adapter(tiny_model("qwen2_moe"))
    place = recorded(tmp_path, adapter)
    assert is_recorded(place.originals, SPEC.num_batches, place.fingerprint)
    assert not is_recorded(place.originals, SPEC.num_batches, {"model": "another"})
    path = batch_path(place.originals, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    assert not is_recorded(place.originals, SPEC.num_batches, place.fingerprint)
    with pytest.raises(ValueError, match="is damaged"):
        read_batch(place.originals, 1)
    recorded(tmp_path, adapter)
    assert path.read_bytes() == whole
