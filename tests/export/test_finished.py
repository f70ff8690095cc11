"""A finished model is visited block by block, and no two blocks of it are there at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeq.checkpoint.stream import BlockStream, open_stream
from moeq.export import reopen
from moeq.export.assemble import packed_format
from moeq.export.dense import write_dense
from moeq.export.finished import FinishedModel, held
from moeq.export.moeq_format import write_packed
from moeq.export.verify import verify_dense, verify_packed
from moeq.models.adapter import Adapter
from tests.export.rounding import round_weight
from tests.export.whole import DictBlocks, make_codes
from tests.tiny import save_tiny, tiny_model

IDS = torch.arange(24).view(2, 12)


class OneAtATime:
    """A stream that notes how many of its blocks are there."""

    def __init__(self, stream: BlockStream) -> None:
        self._stream, self.there, self.most, self.visited = stream, 0, 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    @contextmanager
    def resident(self, block: int) -> Iterator[None]:
        with self._stream.resident(block):
            self.there, self.visited = self.there + 1, self.visited + 1
            self.most = max(self.most, self.there)
            yield
            self.there -= 1


def test_one_block_is_there_at_a_time_and_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reopen, "WHOLE_BYTES", 0)
    folder = save_tiny("mixtral", tmp_path / "model", num_hidden_layers=3)
    model, stream = open_stream(folder, None, lambda dtype: dtype)
    quantized = make_codes(Adapter(tiny_model("mixtral", dtype=torch.bfloat16, num_hidden_layers=3)))
    counting = OneAtATime(stream)
    adapter = Adapter(model, counting)
    source = FinishedModel(adapter, DictBlocks(adapter, quantized))
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    shown: list[tuple[str, int]] = []

    def progress(blocks: range, label: str) -> Iterator[int]:
        for block in blocks:
            yield block
            shown.append((label, block))

    write_packed(source, None, grids, tmp_path / "packed", metadata={}, progress=progress)
    verify_packed(tmp_path / "packed", source, IDS, progress=progress)
    write_dense(source, None, tmp_path / "dense", progress=progress)
    verify_dense(tmp_path / "dense", source, IDS, progress=progress)
    assert (counting.most, counting.visited) == (1, 12)
    assert shown == [(label, block) for label in ("writing", "verifying") for block in range(3)] * 2


def test_codes_outside_of_the_blocks_are_refused() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    head = round_weight(model.lm_head.weight, 4, 8, False)
    with pytest.raises(ValueError, match=r"lm_head lies outside of model\.layers"):
        held(model, {"lm_head": head})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes, name: codes.pop(name), r"has codes of \d+ weights, which are not those of the plan"),
        (lambda codes, name: codes.update({name: replace(codes[name], group_size=32)}), "planned was PackedFormat"),
    ],
)
def test_codes_that_are_not_those_of_the_plan_are_refused_and_leave_no_folder(
    change: object, message: str, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    quantized = make_codes(Adapter(model))
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    change(quantized, next(iter(quantized)))
    with pytest.raises(ValueError, match=message):
        write_packed(held(model, quantized), None, grids, tmp_path / "packed", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_measured_times_are_in_the_manifest_alone(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1)
    quantized = make_codes(Adapter(model))
    grids = {name: packed_format(weight) for name, weight in quantized.items()}
    for seconds in (1, 2):
        folder = tmp_path / str(seconds)
        write_packed(held(model, quantized), None, grids, folder, metadata={"a": 1}, measured={"seconds": seconds})
    differing = {p.name for p in (tmp_path / "1").iterdir() if p.read_bytes() != (tmp_path / "2" / p.name).read_bytes()}
    assert differing == {"moeq_manifest.json"}
