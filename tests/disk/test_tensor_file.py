"""Files written tensor by tensor are those of the safetensors library, and are read as it reads them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeq.disk.tensor_file import DTYPES, Declared, read_ahead, stored_tensors, tensor_file_writer


def made() -> dict[str, Tensor]:
    """A tensor of every dtype, and shapes without dimensions and without elements."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES.values()):
        values = torch.randn(3, number + 1, generator=generator) * 9
        tensors[f"b{number}.weight"] = values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    return {**tensors, "B": torch.tensor(2.0), 'empty "ä"': torch.zeros(0, 4, dtype=torch.int32)}


def declare(tensors: dict[str, Tensor]) -> dict[str, Declared]:
    return {name: Declared(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, declared: dict[str, Declared], *items: tuple[str, Tensor]) -> None:
    with tensor_file_writer(path, declared) as writer:
        for name, tensor in items:
            writer.write(name, tensor)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours, theirs)))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_the_one_of_the_library_to_the_byte_whatever_the_order(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors = made()
    save_file(tensors, tmp_path / "library", metadata=metadata)
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        with tensor_file_writer(tmp_path / "ours", declare(tensors), metadata) as writer:
            for name in order:
                writer.write(name, tensors[name])
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize(
    "tensor", [torch.arange(12).view(3, 4).T, torch.arange(12)[5:], torch.arange(64).as_strided((1, 1), (8, 8), 3)]
)
def test_what_does_not_lie_row_by_row_is_written_as_its_values(tensor: Tensor, tmp_path: Path) -> None:
    write(tmp_path / "a", declare({"x": tensor}), ("x", tensor))
    assert torch.equal(load_file(tmp_path / "a")["x"], tensor)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("y", torch.zeros(2))], r"y was not declared"),
        ([("x", torch.zeros(3))], r"x of .* is torch\.float32 \(3,\), declared was torch\.float32 \(2,\)"),
        ([("x", torch.zeros(2).double())], r"is torch\.float64 \(2,\), declared was torch\.float32"),
        ([("x", torch.zeros(2))] * 2, r"x was written before"),
        ([], r"lacks 1 declared tensors, first x"),
    ],
)
def test_what_was_not_declared_so_is_refused_and_no_file_is_left(
    items: list[tuple[str, Tensor]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", {"x": Declared(torch.float32, (2,))}, *items)
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = made()
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path / "a")
    assert set(stored) == set(tensors)
    read_ahead(stored.values())
    for name, expected in load_file(tmp_path / "a").items():
        found = stored[name]
        assert (found.dtype, found.shape, found.num_bytes) == (expected.dtype, expected.shape, expected.nbytes)
        assert same(found.read(), expected)


@pytest.mark.parametrize("left", [0, 6, 40, -1])
def test_a_file_that_ends_early_is_named(left: int, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:left])
    with pytest.raises(ValueError, match=r"a (is missing, truncated or damaged|has \d+ bytes of \d+)"):
        stored_tensors(tmp_path / "a")


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    stored = stored_tensors(tmp_path / "a")["x"]
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match="a ends before x"):
        stored.read()


@pytest.mark.parametrize(
    ("before", "after"), [(b'"F32"', b'"F99"'), (b"[0,16]", b"[0,12]"), (b'"shape"', b'"shapf"'), (b'{"x"', b'<"x"')]
)
def test_a_damaged_header_is_named(before: bytes, after: bytes, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4)}, tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(before, after))
    with pytest.raises(ValueError, match="a is missing, truncated or damaged"):
        stored_tensors(tmp_path / "a")
