"""Files are split, named and indexed as save_pretrained splits, names and indexes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moeq.checkpoint.loading import load_model
from moeq.disk.folder import INDEX
from moeq.disk.tensor_file import Declared
from moeq.export import layout
from moeq.export.dense import write_dense
from moeq.export.finished import held
from moeq.export.layout import layout_writer, plan_layout
from moeq.export.moeq_format import write_checkpoint
from tests.export.rounding import round_model
from tests.export.whole import save_packed_whole
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD", "60KB")


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_index_are_those_of_save_pretrained(tied: bool, tmp_path: Path) -> None:
    model = load_model(str(save_tiny("qwen3_moe", tmp_path / "model", tie_word_embeddings=tied)))
    quantized = round_model(model)
    write_checkpoint(model, None, quantized, tmp_path / "ours", metadata={"seed": 7})
    save_packed_whole(model, quantized, tmp_path / "whole", max_shard_size="60KB")
    names = [path.name for path in (tmp_path / "whole").glob("*.safetensors")]
    assert len(names) > 2
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    indices = [index_of(tmp_path / kind) for kind in ("ours", "whole")]
    if tied:  # the whole packed model is assembled with two parameters for one, and counts both
        doubled = [index["metadata"].pop("total_parameters") for index in indices]
        assert doubled[1] - doubled[0] == model.lm_head.weight.numel()
    assert indices[0] == indices[1]


@pytest.mark.usefixtures("small_shards")
def test_shards_of_a_dense_export_keep_within_their_bound(tmp_path: Path) -> None:
    """Those of save_pretrained do not: it counts experts that are slices of one tensor once."""
    model = load_model(str(save_tiny("qwen3_moe", tmp_path / "model")))
    write_dense(held(model), None, tmp_path / "ours")
    model.save_pretrained(tmp_path / "whole")
    whole, index = load_file(tmp_path / "whole/model.safetensors"), index_of(tmp_path / "ours")
    found = {}
    for path in (tmp_path / "ours").glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or len(tensors) == 1
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
        found |= tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["metadata"]["total_parameters"] == model.num_parameters()


def test_a_tensor_that_the_plan_does_not_know_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with torch.device("meta"):
        skeleton = tiny_model("olmoe", num_hidden_layers=1)
    planned = plan_layout(skeleton, {"model.norm.weight": Declared(torch.float32, (64,))})
    with (
        pytest.raises(ValueError, match=r"lm_head\.weight is no tensor of the planned files"),
        layout_writer(tmp_path, planned) as writer,
    ):
        writer.write([("lm_head.weight", torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=r"lacks 1 declared tensors"), layout_writer(tmp_path, planned):
        pass
    assert list(tmp_path.iterdir()) == []
