"""Tensors come back bit for bit and without a copy, or an error names the file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeq.disk.checked import read_checked, smallest, write_checked

METADATA = {"layout": "plain", "model": "sha256:aa"}


def some(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every bit pattern, NaN payloads too."""
    return torch.randint(0, 256, (7, 8 * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_what_is_written_comes_back_bit_for_bit(dtype: torch.dtype, generator: torch.Generator, tmp_path: Path) -> None:
    tensors = {"a": some(dtype, generator), "empty": torch.zeros(0, 3, dtype=dtype)}
    write_checked(tmp_path / "file", tensors, METADATA)
    metadata, read = read_checked(tmp_path / "file", "delete it")
    assert metadata == METADATA
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert torch.equal(read["a"].view(torch.uint8), tensors["a"].view(torch.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_views_of_one_tensor_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(4, 5)
    write_checked(tmp_path / "file", {"turned": whole.T, "rows": whole[1:3]}, {})
    _, read = read_checked(tmp_path / "file", "delete it")
    assert torch.equal(read["turned"], whole.T)
    assert torch.equal(read["rows"], whole[1:3])


def test_what_is_read_is_mapped_not_copied(tmp_path: Path) -> None:
    write_checked(tmp_path / "file", {"a": torch.zeros(1000, 1000)}, {})
    _, read = read_checked(tmp_path / "file", "delete it")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [row[0].split("-") for row in maps if row[-1] == str(tmp_path / "file")]
    assert any(int(low, 16) <= read["a"].data_ptr() < int(high, 16) for low, high in ranges)


@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_named(damage: str, part: int, generator: torch.Generator, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_checked(path, {"logits": some(torch.bfloat16, generator), "ids": some(torch.uint8, generator)}, METADATA)
    content = bytearray(path.read_bytes())
    at = len(content) * part // 12
    if damage == "truncated":
        del content[at:]
    else:
        content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is .*damaged.*; delete it"):
        read_checked(path, "delete it")


def test_every_character_of_names_dtypes_shapes_and_metadata_is_checked(
    generator: torch.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    write_checked(path, {"logits": some(torch.bfloat16, generator)}, METADATA)
    content = path.read_bytes()
    for before, after in (
        (b"BF16", b"FP16"),
        (b"BF16", b" F16"),
        (b"[7,8]", b"[8,7]"),
        (b"plain", b"plane"),
        (b"logits", b"digits"),
    ):
        damaged = content.replace(before, after, 1)
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path} is .*damaged"):
            read_checked(path, "delete it")


def test_a_disk_that_fills_up_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeq.disk.atomic.save_file", full)
    with pytest.raises(ValueError, match=r"could not be written \(.*No space left.*make room on its disk"):
        write_checked(tmp_path / "file", {"a": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


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
