"""The Triton kernel for packed weights against its torch twin, on a GPU where there is one, else in the interpreter.

Skipped where triton is missing, as it is beside CPU builds of torch: its wheel is 285 MB, too much for a development
dependency.  ``pip install triton`` runs these tests on any Linux machine.

The interpreter of triton 3.9 cuts bfloat16 off where a GPU rounds to nearest, and does not multiply it: scales are
float32 or float16 where equality is close, and inputs are bfloat16 on a GPU alone.  That of triton 3.6 does not run on
numpy 2.4.
"""

import os

import pytest
import torch
from torch import Tensor

from moeq.kernels.packed_products import PackedMatrix, PackedStack, grouped_product_by_torch
from moeq.kernels.packed_tiles import Tile
from tests.kernels.packed_stacks import bounds_of, stack_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # the interpreter is chosen when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
kernel = pytest.importorskip(
    "moeq.kernels.packed_triton", reason="triton is not installed", exc_type=ModuleNotFoundError
)
SMALL = Tile(16, 16, 32, 4, 2)
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def on_device(stack: PackedStack) -> PackedStack:
    moved = [
        PackedMatrix(*(None if part is None else part.to(DEVICE) for part in vars(matrix).values()))
        for matrix in stack.matrices
    ]
    return PackedStack.of(moved, stack.bits, stack.in_features)


def both(stack: PackedStack, sizes: list[int], dtype: torch.dtype, tile: Tile | None, indirect: bool) -> list[Tensor]:
    """Outputs of the kernel and of its twin; rows of no expert of the stack are 7."""
    generator = torch.Generator().manual_seed(sum(sizes))
    num_rows, bounds_E2 = bounds_of(sizes)
    tokens_N = torch.randint(0, 9, (num_rows,), generator=generator) if indirect else None
    x_TI = torch.randn(9 if indirect else num_rows, stack.in_features, generator=generator).to(dtype)
    given = [None if tensor is None else tensor.to(DEVICE) for tensor in (x_TI, tokens_N, bounds_E2)]
    outputs = [torch.full((num_rows, stack.out_features), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    kernel.grouped_product(*given, on_device(stack), outputs[0], tile)
    grouped_product_by_torch(*given, on_device(stack), outputs[1])
    return outputs


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * float(expected.abs().max()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 24, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_kernel_multiplies_with_the_weights_that_the_twin_dequantizes(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    in_features = 72 if group_size == 24 else 64
    stack = stack_of(3, 20, in_features, bits, group_size, symmetric, torch.float32)
    found, expected = both(stack, [5, 0, 18], torch.float32, SMALL, indirect=True)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize("indirect", [True, False])
def test_every_dtype_of_inputs_is_multiplied_in_it_and_summed_in_float32(dtype: torch.dtype, indirect: bool) -> None:
    for scale_dtype in (dtype, torch.bfloat16):
        stack = stack_of(2, 33, 64, 4, 32, False, scale_dtype)
        found, expected = both(stack, [17, 3], dtype, SMALL, indirect)
        close = {torch.float32: 1e-5, torch.float16: 2e-3}.get(scale_dtype, 2e-2)
        assert_close(found, expected, close)


@pytest.mark.parametrize("sizes", [[1], [0, 1, 0, 0, 2, 0, 40], [0, 0], [16, 16, 1]])
def test_whatever_the_routing_each_row_meets_its_own_expert_and_the_others_stay(sizes: list[int]) -> None:
    whole = stack_of(len(sizes), 16, 32, 2, None, True, torch.float32)
    found, expected = both(whole, sizes, torch.float32, SMALL, indirect=False)
    assert_close(found, expected, 1e-5)
    assert bool((found[-1] == 7.0).all()), "the last row belongs to no expert"


def test_a_block_of_mixed_widths_is_one_launch_for_each_width() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(30, 64, generator=generator).to(DEVICE)
    bounds = {3: [[0, 11], [20, 29]], 8: [[11, 20]]}  # experts 0 and 2 have 3 bits, expert 1 has 8
    found, expected = (torch.zeros(30, 16, device=DEVICE) for _ in range(2))
    for bits, rows in bounds.items():
        stack = on_device(stack_of(len(rows), 16, 64, bits, 32, False, torch.float32))
        bounds_E2 = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        kernel.grouped_product(x_NI, None, bounds_E2, stack, found, SMALL)
        grouped_product_by_torch(x_NI, None, bounds_E2, stack, expected)
    assert_close(found, expected, 1e-5)
    assert bool(found[:29].any(1).all())
    assert not found[29].any()


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_the_tiles_of_the_table_compute_what_small_ones_do(dtype: torch.dtype) -> None:
    stack = stack_of(2, 130, 256, 4, 128, True, torch.bfloat16)
    for sizes in ([1, 2], [40, 30]):
        found, expected = both(stack, sizes, dtype, None, indirect=False)
        assert_close(found, expected, 2e-2)


def test_a_grid_without_a_kernel_is_refused() -> None:
    stack = on_device(stack_of(1, 16, 60, 4, 12, True, torch.float32))
    with pytest.raises(ValueError, match="no multiples of 8; use the twin"):
        kernel.grouped_product(
            torch.zeros(1, 60, device=DEVICE), None, torch.tensor([[0, 1]]), stack, torch.zeros(1, 16, device=DEVICE)
        )
