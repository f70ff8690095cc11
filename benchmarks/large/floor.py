"""What a fit of a block cannot do without: bytes from the disk and products, at the rates that this machine reaches.

    seconds = bytes of the block / reading rate
            + operations of two forward passes / rate of products in the dtype of the model
            + operations of Hessians and solves / rate of float32 products

Two forward passes: one before the weights change, for the Hessians, and one after, for what the next block sees.
Hessians of T tokens take T I^2 operations (they are symmetric), a solve O I^2 of feedback and I^3 / 3 of a factor.
Writing, the search of grids, packing, checksums and verification are not in it.

Shapes: O out features, I in features, T tokens.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.large.checkpoint import Shape

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Rates:
    """What the machine does per second.

    Attributes:
        read: Bytes, of a file that is not in the cache of the system, in order.
        model_products: Operations of products in the dtype of the model.
        float32_products: Operations of float32 products.
    """

    read: float
    model_products: float
    float32_products: float


@dataclass(frozen=True)
class Floor:
    """Of one block, in seconds."""

    read: float
    forward: float
    hessians: float
    solves: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.read + self.forward + self.hessians + self.solves


def reading_rate(path: Path) -> float:
    """Bytes per second of reading a file in order as the library does, after the system has forgotten it."""
    buffer, size = bytearray(_CHUNK), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
    return size / (time.perf_counter() - start)


def product_rate(dtype: torch.dtype, rows: int, in_features: int, out_features: int, seconds: float = 1.0) -> float:
    """Operations per second of x W^T, repeated for some seconds after a first call that is not counted."""
    x_TI, weight_OI = torch.ones(rows, in_features, dtype=dtype), torch.ones(out_features, in_features, dtype=dtype)
    x_TI @ weight_OI.mT
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        x_TI @ weight_OI.mT
        count += 1
    return 2 * rows * in_features * out_features * count / elapsed


def block_linears(shape: Shape) -> list[tuple[int, int, int, float]]:
    """Linears of a block that are quantized, those of one input as one: (number, O, I, share of tokens)."""
    share = shape.num_experts_per_tok / shape.num_experts
    query, key = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    return [
        (1, query + 2 * key, shape.hidden_size, 1.0),
        (1, shape.hidden_size, query, 1.0),
        (shape.num_experts, 2 * shape.moe_intermediate_size, shape.hidden_size, share),
        (shape.num_experts, shape.hidden_size, shape.moe_intermediate_size, share),
    ]


def forward_operations(shape: Shape, num_tokens: int, length: int) -> float:
    """Of one block over all tokens, in sequences of a length; half of the scores of attention are masked."""
    linears = sum(2 * num * out * inner * share for num, out, inner, share in block_linears(shape))
    router = 2 * shape.hidden_size * shape.num_experts
    attention = 2 * length * shape.num_attention_heads * shape.head_dim
    return num_tokens * (linears + router + attention)


def hessian_operations(shape: Shape, num_tokens: int) -> float:
    """Of one block over all tokens."""
    return num_tokens * sum(num * inner**2 * share for num, _, inner, share in block_linears(shape))


def solve_operations(shape: Shape) -> float:
    """Of one block."""
    return sum(num * (out * inner**2 + inner**3 / 3) for num, out, inner, _ in block_linears(shape))


def block_floor(shape: Shape, block_bytes: int, num_tokens: int, length: int, rates: Rates) -> Floor:
    """Seconds of one block.

    Args:
        shape: Of the model.
        block_bytes: Of a block's tensors in the files.
        num_tokens: Of the calibration set.
        length: Of its sequences.
        rates: Of the machine.
    """
    return Floor(
        read=block_bytes / rates.read,
        forward=2 * forward_operations(shape, num_tokens, length) / rates.model_products,
        hessians=hessian_operations(shape, num_tokens) / rates.float32_products,
        solves=solve_operations(shape) / rates.float32_products,
    )
