"""Random packed weights of several experts, made by what writes checkpoints."""

import torch
from torch import Tensor

from moeq.checkpoint.packed_weight import packed_tensors
from moeq.kernels.packed_products import PackedMatrix, PackedStack
from moeq.quant.spec import QuantizedWeight


def random_weight(
    rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype, seed: int = 0
) -> QuantizedWeight:
    """Codes, scales and zero points over all their values."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else columns // group_size
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = (0.05 + torch.rand(rows, groups, generator=generator)).to(dtype)
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes, scale, None if symmetric else zero, bits, group_size)


def stack_of(
    experts: int, rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> PackedStack:
    """The stack of as many random weights, each with a seed of its own."""
    weights = [random_weight(rows, columns, bits, group_size, symmetric, dtype, seed) for seed in range(experts)]
    return PackedStack.of([matrix_of(weight) for weight in weights], bits, columns)


def matrix_of(weight: QuantizedWeight) -> PackedMatrix:
    """As the packed linears of a checkpoint hold it."""
    parts = packed_tensors(weight)
    return PackedMatrix(parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"))


def bounds_of(sizes: list[int]) -> tuple[int, Tensor]:
    """Number of rows, of which the last belongs to no expert, and where those of each expert are."""
    ends = torch.tensor([0, *sizes]).cumsum(0)
    return int(ends[-1]) + 1, torch.stack([ends[:-1], ends[1:]], 1).int()
