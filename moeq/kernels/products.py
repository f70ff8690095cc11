"""Matrix products of the solve, by the fastest public path of the device.

On a CPU ``torch.mm`` calls MKL, which keeps to AVX2 on processors of other makers than Intel; oneDNN uses what the
processor has, at twice the rate where that is AVX-512.  The public way to it in float32 is ``F.linear`` of a tensor in
oneDNN's layout, which copies both operands and the result: worth it from a few hundred rows on.  Which way a product
goes depends on its shape alone, so that an expert's result does not depend on its company.

Shapes: E experts, M rows, K inner, N columns.
"""

import torch
from torch import Tensor

ONEDNN_ROWS = 256  # below, the copies cost more than the product gains


def add_product_(total: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """``total += sign * left @ right`` in float32 or float64, with a leading dimension of experts or without.

    Args:
        total: [M, N] or [E, M, N], any strides; written.
        left: [M, K] or [E, M, K].
        right: [K, N] or [E, K, N].
        sign: 1 or -1.
    """
    if total.dim() == 3:
        if total.device.type == "cpu":  # one after another: the same bits for an expert alone and among others
            for parts in zip(total.unbind(), left.unbind(), right.unbind(), strict=True):
                add_product_(*parts, sign)
        else:
            total.baddbmm_(left, right, alpha=sign)
    elif by_onednn(total, left):
        product_MN = torch.nn.functional.linear(left.to_mkldnn(), right.mT.contiguous()).to_dense()
        total.add_(product_MN, alpha=sign)
    else:
        total.addmm_(left, right, alpha=sign)


def by_onednn(total: Tensor, left: Tensor) -> bool:
    """Whether a product is large enough for oneDNN, and of a kind that it knows."""
    large = min(*total.shape, left.shape[1]) >= ONEDNN_ROWS
    return (
        large and total.dtype == torch.float32 and total.device.type == "cpu" and torch.backends.mkldnn.is_available()
    )
