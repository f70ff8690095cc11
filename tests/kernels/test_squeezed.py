import pytest
import torch

from moeq.kernels.squeezed import spread, squeeze


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_squeezed_nibbles_take_their_bits_and_come_back(width: int) -> None:
    nibbles = torch.randint(0, 2**width, (2, 6, 32), dtype=torch.uint8)
    octets = nibbles[0] | nibbles[1] << 4
    planes = squeeze(octets, width)
    assert sum(plane.nbytes for plane in planes) == octets.numel() * width / 4
    for added in (0, 16 - 2**width):
        out = torch.empty_like(octets)
        spread(planes, width, added, out)
        assert torch.equal(out, (nibbles[0] + added) | (nibbles[1] + added) << 4)


def test_bytes_that_lie_half_an_array_apart_share_one() -> None:
    octets = torch.tensor([0x12, 0x30, 0x21, 0x03] * 4, dtype=torch.uint8)
    (plane,) = squeeze(octets, 2)
    assert plane.tolist() == [octets[i] + 4 * octets[i + 8] for i in range(8)]
