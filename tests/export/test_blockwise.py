"""Exports that are written and verified block by block are, to the byte, those of whole models."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moeq.checkpoint.loading import load_model
from moeq.checkpoint.sources import loading_info, made_of
from moeq.checkpoint.stream import open_stream
from moeq.export import reopen
from moeq.export.assemble import packed_format
from moeq.export.contents import read_contents
from moeq.export.dense import write_dense
from moeq.export.finished import FinishedModel
from moeq.export.moeq_format import write_packed
from moeq.export.verify import verify_dense, verify_packed
from moeq.models.adapter import Adapter
from tests.export.whole import DictBlocks, make_codes, save_packed_whole
from tests.families import SUPPORTED
from tests.tiny import save_tiny

IDS = torch.arange(24).view(2, 12) * 11


def streamed(folder: Path, quantized: dict) -> FinishedModel:
    """The model of a folder one block at a time, its parameters widened."""
    model, stream = open_stream(folder, None, lambda _: torch.float32)
    adapter = Adapter(model, stream)
    return FinishedModel(adapter, DictBlocks(adapter, quantized))


def weights(folder: Path) -> dict[str, bytes]:
    """Of ``save_pretrained``, too; its other files are those of the source in an export."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}


def hold_as_in_files(model: nn.Module, folder: Path) -> None:
    """Give a model the tensors of its files where it holds them in another dtype: exports have that of the files."""
    contents = read_contents(folder)
    for name, source in contents.sources.items():
        held = model.get_parameter_or_buffer(name)
        if held.dtype != source.tensors[0][0].dtype:
            made = made_of(contents.model, name, source, loading_info(), lambda *given: given[-1].read())[name]
            held.data = made[0] if isinstance(made, list) else made


@pytest.mark.slow
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_streamed_model_gives_the_files_of_a_whole_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reopen, "WHOLE_BYTES", 0)
    folder = save_tiny(family, tmp_path / "model")
    whole = load_model(str(folder))
    adapter = Adapter(whole)
    quantized = make_codes(adapter)
    source = streamed(folder, quantized)
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    write_packed(source, None, grids, tmp_path / "packed", metadata={"seed": 7})
    write_dense(source, None, tmp_path / "dense")
    for block in range(len(adapter.blocks)):
        DictBlocks(adapter, quantized).commit(block)
    hold_as_in_files(whole, folder)
    save_packed_whole(whole, quantized, tmp_path / "packed_whole")
    whole.save_pretrained(tmp_path / "dense_whole")
    for kind in ("packed", "dense"):
        ours, theirs = weights(tmp_path / kind), weights(tmp_path / f"{kind}_whole")
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
    for report in (verify_packed(tmp_path / "packed", source, IDS), verify_dense(tmp_path / "dense", source, IDS)):
        assert report.logits_equal
        assert report.num_other > 0
