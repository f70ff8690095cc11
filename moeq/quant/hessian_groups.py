"""The sums of ``moeq.quant.hessian`` for all experts of a batch at once, where launches are what costs.

One product per expert, of all its rows, and a handful of operations for each chunk of experts.  The chunk's products
are float32 and add up in float64, as they do one expert at a time; the order of the sums over tokens inside a product
is the library's, so that results agree to the rounding of float32 and not to the last bit.

Shapes: E experts, I in features, N rows of all experts, C experts of a chunk.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moeq.quant.hessian import HessianState

CHUNK_BYTES = 1 << 28  # of products that wait to be added


def experts_of_chunk(num_experts: int, in_features: int) -> int:
    """Experts whose products are added together."""
    return min(num_experts, max(1, CHUNK_BYTES // (4 * in_features**2)))


def groups_bytes(num_experts: int, in_features: int, num_rows: int) -> int:
    """Most that ``accumulate_groups`` holds beside its arguments, where all rows are those of one chunk of experts."""
    products = 4 * in_features**2 * experts_of_chunk(num_experts, in_features)
    rows = 4 * in_features * num_rows
    return products + rows + max(rows, 2 * products)


def accumulate_groups(
    state: HessianState,
    x_NI: Tensor,
    affinity_N: Tensor,
    starts: list[int],
    power: float,
    pool: HessianState | None = None,
) -> None:
    """Add the rows of all experts, in place; see ``moeq.quant.hessian.accumulate``.

    Args:
        state: Sums to add to.
        x_NI: Inputs, sorted by expert.
        affinity_N: Not negative, in the order of the rows.
        starts: E + 1 numbers: the rows of expert e are [starts[e], starts[e + 1]).
        power: p.
        pool: Sums over all experts (E = 1), which get the same.
    """
    weight_N = affinity_N.float().pow(power)
    root_N1 = weight_N.sqrt().unsqueeze(1)
    num_experts, in_features = len(starts) - 1, x_NI.shape[1]
    step = experts_of_chunk(num_experts, in_features)
    product_CII = torch.empty(step, in_features, in_features, device=x_NI.device)
    for first in range(0, num_experts, step):
        chunk = slice(first, min(first + step, num_experts))
        own_CII = product_CII[: chunk.stop - chunk.start]
        rows = slice(starts[chunk.start], starts[chunk.stop])
        rows_NI = x_NI[rows].float() * root_N1[rows]
        for product_II, (start, stop) in zip(own_CII, pairwise(starts[chunk.start : chunk.stop + 1]), strict=True):
            part_NI = rows_NI[start - rows.start : stop - rows.start]
            torch.mm(part_NI.mT, part_NI, out=product_II)
        symmetric_CII = own_CII.tril()
        symmetric_CII += own_CII.tril(-1).mT
        state.sum_EII[chunk] += symmetric_CII
        if pool is not None:
            pool.sum_EII[0] += symmetric_CII.sum(0, dtype=torch.float64)
    _add_counts(state, _counts(affinity_N, weight_N, starts), pool)


def _counts(affinity_N: Tensor, weight_N: Tensor, starts: list[int]) -> Tensor:
    """The numbers of a state for each expert, float64 [E, 5]: tokens, affinities and weights with their squares."""
    affinity_N, weight_N = affinity_N.double(), weight_N.double()
    values = [torch.ones_like(affinity_N), affinity_N, affinity_N.square(), weight_N, weight_N.square()]
    sizes_E = torch.tensor([stop - start for start, stop in pairwise(starts)], device=affinity_N.device)
    return torch.segment_reduce(torch.stack(values, 1), "sum", lengths=sizes_E, axis=0, initial=0)


def _add_counts(state: HessianState, counts_E5: Tensor, pool: HessianState | None) -> None:
    for tensor_E, count_E in zip(state.tensors()[1:], counts_E5.unbind(1), strict=True):
        tensor_E += count_E
    if pool is not None:
        for tensor_1, count_1 in zip(pool.tensors()[1:], counts_E5.sum(0).split(1), strict=True):
            tensor_1 += count_1
