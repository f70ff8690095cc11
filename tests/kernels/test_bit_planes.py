import pytest
import torch

from moeq.kernels.bit_planes import join_planes, split_planes


def reference_plane_bits(code_IO: torch.Tensor, first: int, width: int) -> list[list[int]]:
    """Byte j of a row: the bits of the out features j, j + O w / 8, ..., from its lowest bits on."""
    columns, rows = code_IO.shape
    run = rows * width // 8
    return [
        [
            sum((int(code_IO[i, j + part * run]) >> first) % 2**width << (width * part) for part in range(8 // width))
            for j in range(run)
        ]
        for i in range(columns)
    ]


@pytest.mark.parametrize(("bits", "widths"), [(2, (2,)), (3, (2, 1)), (4, (4,)), (7, (4, 2, 1)), (8, (8,))])
def test_each_plane_holds_some_bits_of_every_code_in_runs(bits: int, widths: tuple[int, ...]) -> None:
    code_IO = torch.randint(0, 2**bits, (5, 16), dtype=torch.uint8)
    planes, first = split_planes(code_IO, bits), 0
    assert len(planes) == len(widths)
    for plane, width in zip(planes, widths, strict=True):
        assert plane.tolist() == reference_plane_bits(code_IO, first, width)
        first += width


@pytest.mark.parametrize("bits", range(1, 9))
def test_joining_gives_the_codes_back_of_any_rows(bits: int) -> None:
    code_IO = torch.randint(0, 2**bits, (6, 40), dtype=torch.uint8)
    planes = split_planes(code_IO, bits)
    assert sum(plane.nbytes for plane in planes) == 6 * 40 * bits // 8
    out, work = torch.empty(3, 40, dtype=torch.uint8), torch.empty(3, 40, dtype=torch.uint8)
    join_planes([plane[2:5] for plane in planes], bits, out, work)
    assert torch.equal(out, code_IO[2:5])
