"""The original's logits come back from disk bit for bit, or an error names the file."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moeq.tasks.fingerprint import fingerprint
from moeq.tasks.stored import SPARE_BYTES, Said, StoredOriginal, plan_key, smallest


@dataclass(frozen=True)
class Batch:
    """Anything of which a plan may be made."""

    ids_BL: Tensor
    rows: tuple[tuple[int, ...], ...]
    name: str | None = None


BATCH = Batch(torch.arange(6).view(2, 3), ((1, 2), (3,)))


def of(model: str = "sha256:aa") -> str:
    return fingerprint(model=model, dtype="bfloat16", reference=None, settings={}, versions={})


def said(dtype: torch.dtype, generator: torch.Generator) -> Said:
    bits_NV = torch.randint(-(2**15), 2**15, (7, 50), generator=generator).to(torch.int16)  # NaN payloads too
    logits_NV = bits_NV.view(dtype) if dtype.itemsize == 2 else torch.randn(7, 50, dtype=dtype, generator=generator)
    ids_TK = torch.randint(0, 200, (9, 4), generator=generator)
    return Said(logits_NV, {"model.layers.0.mlp.experts": ids_TK, "model.layers.1.mlp.experts": ids_TK + 256})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_comes_back_bit_for_bit_in_small_integers(
    dtype: torch.dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    written, original = said(dtype, generator), StoredOriginal(tmp_path / "original", of())
    assert not original.has(BATCH)
    original.store(BATCH, written)
    again = StoredOriginal(tmp_path / "original", of())
    assert again.has(BATCH)
    read = again.load(BATCH)
    assert read.logits_NV.dtype == dtype
    assert torch.equal(read.logits_NV.view(torch.uint8), written.logits_NV.view(torch.uint8))
    assert read.routing.keys() == written.routing.keys()
    assert [ids_TK.dtype for ids_TK in read.routing.values()] == [torch.uint8, torch.int16]
    assert all(torch.equal(read.routing[name].long(), ids_TK) for name, ids_TK in written.routing.items())
    assert sorted(path.suffix for path in (tmp_path / "original").iterdir()) == [".json", ".safetensors"]


def test_views_of_one_tensor_can_be_stored(tmp_path: Path) -> None:
    logits_NV = torch.arange(20.0).view(4, 5)
    original = StoredOriginal(tmp_path, of())
    original.store(BATCH, Said(logits_NV.T, {"a": torch.ones(2, 2).long()[:1], "b": torch.zeros(0, 2).long()}))
    read = original.load(BATCH)
    assert torch.equal(read.logits_NV, logits_NV.T)
    assert read.routing["b"].shape == (0, 2)


def test_what_is_read_is_mapped_not_copied(tmp_path: Path) -> None:
    original = StoredOriginal(tmp_path, of())
    original.store(BATCH, Said(torch.zeros(1000, 1000), {}))
    logits_NV = original.load(BATCH).logits_NV
    (path,) = tmp_path.glob("*.safetensors")
    start = logits_NV.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    assert any(int(a, 16) <= start < int(b, 16) for a, b in (row[0].split("-") for row in ranges))


@pytest.mark.parametrize(
    "other",
    [
        replace(BATCH, ids_BL=BATCH.ids_BL.view(3, 2)),
        replace(BATCH, ids_BL=BATCH.ids_BL.int()),
        replace(BATCH, ids_BL=BATCH.ids_BL.flip(0)),
        replace(BATCH, rows=((1,), (2, 3))),
        replace(BATCH, rows=((1, 2, 3),)),
        replace(BATCH, name="None"),
    ],
)
def test_another_batch_has_another_key(other: Batch, tmp_path: Path) -> None:
    original = StoredOriginal(tmp_path, of())
    original.store(BATCH, Said(torch.zeros(1, 1), {}))
    assert plan_key(other) != plan_key(BATCH)
    assert not original.has(other)
    with pytest.raises(ValueError, match="no logits of the original are stored for this batch"):
        original.load(other)


def test_an_equal_batch_has_the_same_key() -> None:
    assert plan_key(Batch(torch.arange(12).view(2, 6)[:, ::2] // 2, ((1, 2), (3,)))) == plan_key(
        replace(BATCH, ids_BL=torch.tensor([[0, 1, 2], [3, 4, 5]]))
    )


@pytest.mark.parametrize("where", ["start", "middle", "end"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_named(damage: str, where: str, generator: torch.Generator, tmp_path: Path) -> None:
    original = StoredOriginal(tmp_path, of())
    original.store(BATCH, said(torch.bfloat16, generator))
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    at = {"start": 3, "middle": len(content) // 2, "end": len(content) - 1}[where]
    if damage == "truncated":
        del content[at:]
    else:
        content[at] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is .*damaged.*; delete it and start again"):
        original.load(BATCH)


def test_a_file_of_another_original_is_refused(tmp_path: Path) -> None:
    StoredOriginal(tmp_path / "a", of()).store(BATCH, Said(torch.zeros(1, 1), {}))
    other = StoredOriginal(tmp_path / "b", of("sha256:bb"))
    for path in (tmp_path / "a").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "b")
    with pytest.raises(ValueError, match="holds the logits of another original"):
        other.load(BATCH)


def test_a_folder_of_another_original_is_refused(tmp_path: Path) -> None:
    StoredOriginal(tmp_path, of())
    with pytest.raises(ValueError, match="another original \\(model: 'sha256:aa' -> 'sha256:bb'\\); delete it"):
        StoredOriginal(tmp_path, of("sha256:bb"))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        StoredOriginal(tmp_path, of())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"safetensors files but no manifest.json; give a folder of its own"):
        StoredOriginal(tmp_path, of())


def test_what_the_disk_has_no_room_for_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StoredOriginal(tmp_path, of())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=SPARE_BYTES + 5_000_000_000))
    original.check_room(5_000_000_000)
    with pytest.raises(ValueError, match=r"need 5\.2 GB in .* has 5\.0 GB left; lower num_documents"):
        original.check_room(5_200_000_000)


def test_a_disk_that_fills_up_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    original = StoredOriginal(tmp_path, of())
    monkeypatch.setattr("moeq.tasks.stored.save_file", full)
    with pytest.raises(ValueError, match=r"could not be written \(.*No space left.*make room on its disk"):
        original.store(BATCH, Said(torch.zeros(1, 1), {}))
    assert not original.has(BATCH)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, torch.uint8), (0, 256, torch.int16), (-1, 0, torch.int16), (0, 2**15 - 1, torch.int16),
        (0, 2**15, torch.int32), (0, 2**31, torch.int64),
    ],
)  # fmt: skip
def test_whole_numbers_take_the_smallest_dtype_that_holds_them(low: int, high: int, dtype: torch.dtype) -> None:
    ids = torch.tensor([low, high])
    assert smallest(ids).dtype == dtype
    assert torch.equal(smallest(ids).long(), ids)
