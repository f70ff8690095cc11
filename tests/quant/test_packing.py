import pytest
import torch
from torch import Tensor

from moeq.quant.packing import num_words, pack, unpack

SIZES = (1, 5, 8, 31, 32, 33, 64, 100)


def reference_pack(row: list[int], bits: int) -> list[int]:
    """The stream as a string of binary digits, first code rightmost, cut into signed 32-bit words."""
    digits = "".join(format(code, f"0{bits}b") for code in reversed(row))
    digits = digits.zfill(-(-len(digits) // 32) * 32)
    words = [int(digits[i : i + 32], 2) for i in range(0, len(digits), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in reversed(words)]


def random_codes(*shape: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_the_little_endian_stream_of_bits(bits: int) -> None:
    for size in SIZES:
        codes = random_codes(3, size, bits=bits)
        packed = pack(codes, bits)
        assert packed.dtype == torch.int32
        assert packed.tolist() == [reference_pack(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_back_the_codes(bits: int) -> None:
    for shape in [(size,) for size in SIZES] + [(1, 3), (3, 1), (1, 1), (2, 3, 7), (4, 1, 32)]:
        codes = random_codes(*shape, bits=bits)
        packed = pack(codes, bits)
        assert packed.shape[-1] == num_words(shape[-1], bits)
        assert torch.equal(unpack(packed, bits, shape[-1]), codes)
        highest = torch.full_like(codes, 2**bits - 1)
        assert torch.equal(unpack(pack(highest, bits), bits, shape[-1]), highest)


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_takes_columns_of_a_transposed_tensor(bits: int) -> None:
    codes = random_codes(5, 33, bits=bits)
    stored = pack(codes, bits).mT.contiguous()
    assert torch.equal(unpack(stored.mT, bits, 33), codes)
    single = pack(codes[:, :1], bits).mT.contiguous()  # one word a row, with a stride that no view as bytes accepts
    assert torch.equal(unpack(single.mT, bits, 1), codes[:, :1])


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_the_one_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for size in SIZES:
        codes = random_codes(6, size, bits=bits)
        signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        theirs = helpers.pack_to_int32(signed, bits)
        assert torch.equal(pack(codes, bits), theirs)
        assert torch.equal(unpack(theirs, bits, size), codes)
        along_rows = helpers.pack_to_int32(signed, bits, packed_dim=0)
        assert torch.equal(pack(codes.mT, bits).mT, along_rows)


def test_impossible_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"bits \(9\) must be between 1 and 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"torch\.int64; pack takes torch\.uint8"):
        pack(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"3 words a row; 40 codes of 3 bits take 4 words"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 3, 40)
