import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeq.kernels import nibbles
from moeq.kernels.nibbles import GROUP_SIZES, arrangement, nibble_product, pack_nibbles, unpack_rows

pytestmark = pytest.mark.skipif(arrangement() is None, reason="torch has no operation on 4 bits for this processor")


def reference_product(x_MI: Tensor, code_OI: Tensor, group_size: int, scale_offset_GO2: Tensor) -> Tensor:
    """In float64, one group after another."""
    y_MO = torch.zeros(len(x_MI), len(code_OI), dtype=torch.float64)
    for group, (scale_O, offset_O) in enumerate(scale_offset_GO2.double().transpose(1, 2)):
        part = slice(group * group_size, (group + 1) * group_size)
        weight_OS = (code_OI[:, part].double() - 8) * scale_O[:, None] + offset_O[:, None]
        y_MO += x_MI[:, part].double() @ weight_OS.T
    return y_MO


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_products_agree_with_a_loop_over_groups_up_to_their_rounding(group_size: int) -> None:
    code_OI = torch.randint(0, 16, (128, 512), dtype=torch.uint8)
    parameters = torch.rand(512 // group_size, 128, 2).bfloat16()
    for rows in (1, 5):
        x_MI = torch.randn(rows, 512).bfloat16()
        expected = reference_product(x_MI, code_OI, group_size, parameters)
        found = nibble_product(x_MI, pack_nibbles(code_OI), group_size, parameters)
        # Float32 sums, rounded to bfloat16 once.
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)


def test_codes_come_back_in_features_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nibbles, "_AT_ONCE", 64)
    code_OI, order = torch.randint(0, 16, (192, 96), dtype=torch.uint8), arrangement()
    assert order is not None
    packed_OH = pack_nibbles(code_OI)
    assert packed_OH.shape == (192, 48)
    out_IO = torch.empty(30, 192, dtype=torch.uint8)
    unpack_rows(packed_OH, order, slice(10, 40), out_IO)
    assert torch.equal(out_IO.mT, code_OI[:, 10:40])


@pytest.mark.slow
def test_the_arrangement_is_understood_on_lesser_processors() -> None:
    code = "from moeq.kernels.nibbles import arrangement; assert arrangement() is not None"
    subprocess.run([sys.executable, "-c", code], env={"ATEN_CPU_CAPABILITY": "avx2"}, check=True, timeout=120)


@pytest.mark.parametrize("change", [lambda code_OI: code_OI.roll(1, 0), lambda code_OI: code_OI[torch.randperm(64)]])
def test_an_arrangement_that_is_not_understood_is_none(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = nibbles._pack
    monkeypatch.setattr(nibbles, "_pack", lambda code_OI: pack(change(code_OI)))
    assert arrangement.__wrapped__() is None
