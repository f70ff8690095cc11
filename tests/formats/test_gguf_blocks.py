"""Blocks hold codes and scales bit for bit: read by llama.cpp's definitions, number by number, and by gguf."""

import struct
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import PackedFormat
from moeq.formats.gguf_blocks import FILE_TYPES, plain, plain_type, quantized_type, rounding_bound, to_bytes
from moeq.formats.gguf_file import OWN
from moeq.quant.spec import QuantizedWeight
from tests.export.rounding import real_weight

ROWS = 3


def random_weight(bits: int, group_size: int | None, *, symmetric: bool, columns: int = 128) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits)
    groups = columns // (group_size or columns)
    codes = torch.randint(0, 2**bits, (ROWS, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(ROWS, groups, generator=generator) * 0.01 + 1e-3).bfloat16()
    zero = torch.randint(0, 2**bits, (ROWS, groups), generator=generator, dtype=torch.uint8)
    if symmetric:  # scales of both signs
        return QuantizedWeight(codes, scale * torch.tensor([1, -1, 1])[:, None], None, bits, group_size)
    return QuantizedWeight(codes, scale, zero, bits, group_size)


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def reference_q1_0(raw: bytes) -> list[float]:
    d = half(raw[:2])
    return [d if raw[2 + i // 8] >> (i % 8) & 1 else -d for i in range(128)]


def reference_q2_0(raw: bytes) -> list[float]:
    d = half(raw[:2])
    return [((raw[2 + i // 4] >> (2 * (i % 4)) & 3) - 1) * d for i in range(64)]


def reference_q4_0(raw: bytes) -> list[float]:
    d = half(raw[:2])
    nibbles = [raw[2 + i] & 15 for i in range(16)] + [raw[2 + i] >> 4 for i in range(16)]
    return [(q - 8) * d for q in nibbles]


def reference_q4_1(raw: bytes) -> list[float]:
    d, m = half(raw[:2]), half(raw[2:4])
    nibbles = [raw[4 + i] & 15 for i in range(16)] + [raw[4 + i] >> 4 for i in range(16)]
    return [q * d + m for q in nibbles]


def reference_fifths(raw: bytes) -> list[int]:
    (high,) = struct.unpack("<I", raw[:4])
    nibbles = [raw[4 + i] & 15 for i in range(16)] + [raw[4 + i] >> 4 for i in range(16)]
    return [q | (high >> i & 1) << 4 for i, q in enumerate(nibbles)]


def reference_q5_0(raw: bytes) -> list[float]:
    return [(q - 16) * half(raw[:2]) for q in reference_fifths(raw[2:])]


def reference_q5_1(raw: bytes) -> list[float]:
    return [q * half(raw[:2]) + half(raw[2:4]) for q in reference_fifths(raw[4:])]


def reference_q8_0(raw: bytes) -> list[float]:
    return [q * half(raw[:2]) for q in struct.unpack("<32b", raw[2:])]


REFERENCES: dict[str, Callable[[bytes], list[float]]] = {
    "Q1_0": reference_q1_0, "Q2_0": reference_q2_0, "Q4_0": reference_q4_0, "Q4_1": reference_q4_1,
    "Q5_0": reference_q5_0, "Q5_1": reference_q5_1, "Q8_0": reference_q8_0,
}  # fmt: skip


def read(kind: str, raw: np.ndarray) -> Tensor:
    """Values of rows of blocks, number by number."""
    size = FILE_TYPES[kind].num_bytes
    rows = [row.tobytes() for row in raw]
    values = [[v for at in range(0, len(row), size) for v in REFERENCES[kind](row[at : at + size])] for row in rows]
    return torch.tensor(values, dtype=torch.float64).float()


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "symmetric"),
    [
        ("Q1_0", 1, 128, True), ("Q1_0", 1, None, True), ("Q2_0", 1, 64, True), ("Q4_0", 1, 32, True),
        ("Q2_0", 2, 64, True), ("Q2_0", 2, None, True), ("Q4_0", 4, 32, True), ("Q4_0", 3, 64, False),
        ("Q4_0", 3, 128, True), ("Q4_0", 2, 32, True), ("Q4_0", 2, 32, False), ("Q5_0", 4, 32, False),
        ("Q5_0", 5, None, True), ("Q8_0", 8, 64, True), ("Q8_0", 7, 32, False), ("Q8_0", 6, 32, True),
    ],
)  # fmt: skip
def test_a_grid_has_its_type_and_the_type_every_value(
    kind: str, bits: int, group_size: int | None, symmetric: bool
) -> None:
    weight = random_weight(bits, group_size, symmetric=symmetric)
    assert quantized_type(PackedFormat(bits, group_size, symmetric), 128, "exact") == kind
    raw = to_bytes(kind, weight)
    assert raw.shape == (ROWS, FILE_TYPES[kind].row_bytes(128))
    expected = real_weight(weight)
    assert torch.equal(read(kind, raw).bfloat16(), expected)
    if kind in OWN:
        assert torch.equal(OWN[kind](torch.from_numpy(raw)).bfloat16(), expected)
    else:
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert torch.equal(torch.from_numpy(theirs).bfloat16(), expected)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 4), ("Q5_1", 5)])
def test_offsets_are_rounded_within_the_bound(kind: str, bits: int) -> None:
    weight = random_weight(bits, 32, symmetric=False)
    weight.scale_OG[0, 0], weight.zero_point_OG[0, 0] = 255 * 2.0**-15, 15  # 15 * 255 has 12 bits, float16 has 11
    assert quantized_type(PackedFormat(bits, 32, False), 128, "native") == kind
    raw = to_bytes(kind, weight, "native")
    found = read(kind, raw)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])))
    scale = weight.scale_OG.float().repeat_interleave(32, 1)
    zero = weight.zero_point_OG.float().repeat_interleave(32, 1)
    error = (found - (weight.codes_OI.float() - zero) * scale).abs()
    assert 0 < float((error / scale).max()) < 2**bits * 2**-11
    assert bool((error <= rounding_bound(weight).repeat_interleave(32, 1)).all())


def test_a_scale_that_float16_does_not_hold_is_refused_or_rounded_as_asked() -> None:
    weight = random_weight(4, 32, symmetric=True)
    weight.scale_OG[0, 0] = torch.tensor(1.01 * 2.0**-20).bfloat16()
    with pytest.raises(ValueError, match=r"does not hold 1 of them exactly .* set carrier to native"):
        to_bytes("Q4_0", weight)
    found, exact = read("Q4_0", to_bytes("Q4_0", weight, "native")), real_weight(weight).float()
    assert not torch.equal(found[0, :32], exact[0, :32])
    assert bool(((found - exact).abs()[0, :32] <= rounding_bound(weight)[0, 0]).all())
    assert torch.equal(found[0, 32:].bfloat16(), exact[0, 32:].bfloat16())


def test_a_group_of_zeros_needs_no_scale() -> None:
    weight = random_weight(4, 32, symmetric=True)
    weight.codes_OI[1, 32:64], weight.scale_OG[1, 1] = 8, torch.tensor(1e-20).bfloat16()
    assert bool((read("Q4_0", to_bytes("Q4_0", weight))[1, 32:64] == 0).all())


@pytest.mark.parametrize("carrier", ["exact", "native"])
def test_a_scale_above_float16_is_always_refused(carrier: str) -> None:
    weight = random_weight(4, 32, symmetric=True)
    weight.scale_OG[0, 0] = 1e6
    with pytest.raises(ValueError, match="above 65504"):
        to_bytes("Q4_0", weight, carrier)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_keep_their_bits(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = to_bytes(kind, values)
    assert torch.equal(torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])).to(dtype), values)


def test_indices_are_whole_numbers_of_32_bits() -> None:
    indices = torch.tensor([[0, 7], [300, 2**24 + 1]])
    assert plain_type(indices.dtype) == "I32"
    assert plain("I32", indices).tobytes() == indices.numpy().astype("<i4").tobytes()
    with pytest.raises(ValueError, match=r"GGUF holds no torch.bool"):
        plain_type(torch.bool)


def test_widths_and_groups_without_a_type_are_refused() -> None:
    for grid, columns in ((PackedFormat(8, 32, False), 128), (PackedFormat(4, 16, True), 128)):
        with pytest.raises(ValueError, match="gguf has no type that holds"):
            quantized_type(grid, columns, "exact")
    with pytest.raises(ValueError, match="gguf has no type that holds"):
        quantized_type(PackedFormat(4, None, True), 48, "exact")
