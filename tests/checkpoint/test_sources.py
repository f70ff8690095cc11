"""Files that weights come in: pickled or not, in shards or one, behind symbolic links."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeq.checkpoint.loading import load_model, model_bytes, stream_model
from moeq.checkpoint.placement import stream_obstacle
from moeq.disk.folder import check_integrity
from moeq.disk.pickled import pickled_tensors
from tests.tiny import save_tiny


def pickle(folder: Path, shards: int, *, old: bool = False) -> Path:
    """Replace the safetensors file of a folder by files of torch."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    keys = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        return folder
    places = {key: f"pytorch_model-0000{1 + i % shards}-of-0000{shards}.bin" for i, key in enumerate(keys)}
    for name in set(places.values()):
        torch.save({key: tensors[key] for key in keys if places[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def link(folder: Path, cache: Path) -> Path:
    """The folder as the cache of the hub has it: names that are symbolic links to blobs."""
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (cache / "blobs" / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    return snapshot


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("layout", ["one", "shards", "old", "links", "linked shards"])
def test_pickled_and_linked_weights_are_those_of_safetensors_in_both_placements(layout: str, tmp_path: Path) -> None:
    plain, folder = save_tiny("qwen3_moe", tmp_path / "plain"), save_tiny("qwen3_moe", tmp_path / "model")
    if layout != "links":
        pickle(folder, 2 if "shards" in layout else 1, old=layout == "old")
    if "link" in layout:
        folder = link(folder, tmp_path / "cache")
    check_integrity(folder)
    assert stream_obstacle(str(folder)) is None
    expected = load_model(str(plain)).state_dict()
    assert equal(load_model(str(folder)).state_dict(), expected)
    assert model_bytes(str(folder)) == pytest.approx(model_bytes(str(plain)), rel=0.1)
    model, stream = stream_model(str(folder))
    stream.read_ahead(0)
    with stream.resident(0), stream.resident(1):
        assert equal(model.state_dict(), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r"holds \['model\.fp16\.safetensors'\], but weights are read from model"),
        ("weights.safetensors", r"holds \['weights\.safetensors'\], .*; rename what is the model, or convert"),
        (None, r"holds no weights \(model\.safetensors, or .*; download or copy it again"),
    ],
)  # fmt: skip
def test_weights_under_another_name_are_named(name: str | None, message: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path)
    if name:
        (folder / "model.safetensors").rename(folder / name)
    else:
        (folder / "model.safetensors").unlink()
    for open_model in (load_model, stream_model):
        with pytest.raises(ValueError, match=message):
            open_model(str(folder))


def test_a_second_copy_in_another_layout_is_left_alone(tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path)
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    load_model(str(folder))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = pickle(save_tiny("qwen3_moe", tmp_path), 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"-00002-of-00002\.bin is missing, though .*index\.json names it"):
        load_model(str(folder))


def test_a_pickled_file_runs_no_code_and_a_truncated_one_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "code": Path("x")}, tmp_path / "code.bin")
    with pytest.raises(ValueError, match=r"code\.bin is missing, truncated or damaged"):
        pickled_tensors(tmp_path / "code.bin")
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "more.bin")
    with pytest.raises(ValueError, match=r"more\.bin holds more than tensors by name"):
        pickled_tensors(tmp_path / "more.bin")
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "whole.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.bin is missing, truncated or damaged"):
        pickled_tensors(tmp_path / "cut.bin")
