"""The torch twin of the packed kernel against the dequantization that moeq's files are defined by."""

from dataclasses import replace

import pytest
import torch

from moeq.kernels.packed_products import PackedStack, dequantized, grouped_product_by_torch, kernel_problem
from moeq.kernels.packed_tiles import TILES, tile_for
from moeq.quant.grid import dequantize_weight
from tests.kernels.packed_stacks import bounds_of, matrix_of, random_weight, stack_of


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_stack_dequantizes_to_the_bits_that_its_files_stand_for(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    shape = (11, 48, bits, group_size, symmetric, torch.bfloat16)
    stack = stack_of(3, *shape)
    for expert in range(3):
        expected_OI = dequantize_weight(random_weight(*shape, seed=expert), torch.bfloat16)
        assert torch.equal(dequantized(stack, expert), expected_OI)


def test_each_row_is_multiplied_with_its_own_expert() -> None:
    stack = stack_of(3, 5, 16, 4, 8, False, torch.float32)
    num_rows, bounds_E2 = bounds_of([2, 0, 4])
    generator = torch.Generator().manual_seed(0)
    x_TI, tokens_N = torch.randn(4, 16, generator=generator), torch.randint(0, 4, (num_rows,), generator=generator)
    out_NO = torch.full((num_rows, 5), 7.0)
    grouped_product_by_torch(x_TI, tokens_N, bounds_E2, stack, out_NO)
    for row, expert in enumerate([0, 0, 2, 2, 2, 2]):
        torch.testing.assert_close(out_NO[row], dequantized(stack, expert) @ x_TI[tokens_N[row]])
    assert bool((out_NO[-1] == 7.0).all())


def test_grids_that_the_kernel_does_not_take_are_told_with_the_reason() -> None:
    assert kernel_problem(4, 64, 2048) is None
    assert kernel_problem(5, 64, 2048) == "5 bits are none of 2, 3, 4, 8"
    assert kernel_problem(3, 12, 60) == "rows of 60 in groups of 12 are no multiples of 8"


def test_few_rows_have_narrow_tiles_and_many_rows_the_widest() -> None:
    assert tile_for(8, 128) == TILES[0][1]  # one token of eight experts: a row each
    assert tile_for(4096 * 8, 128) == TILES[-1][1]
    assert tile_for(0, 128) == TILES[0][1]
    assert [bound for bound, _ in TILES] == sorted(bound for bound, _ in TILES)


def test_weights_that_a_kernel_could_not_address_are_refused() -> None:
    matrix = matrix_of(random_weight(8, 32, 4, 16, True, torch.float32))
    for packed_OW in (matrix.packed_OW.T, torch.empty(100, dtype=torch.int32)[1:33].view(8, 4)):
        with pytest.raises(ValueError, match="must be contiguous from a multiple of 16 bytes; clone them"):
            PackedStack.of([replace(matrix, packed_OW=packed_OW)], 4, 32)
