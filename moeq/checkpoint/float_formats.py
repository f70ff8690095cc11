"""Sources whose weights are floats of 8 or 4 bits with scales: FP8, and the MXFP4 of gpt-oss.

FP8: ``x.weight`` (float8) times ``x.weight_scale_inv`` or ``x.weight_scale``, a number per block, row or matrix; with
several experts in one tensor, ``x`` and ``x_scale_inv`` with experts in front.  MXFP4: ``x_blocks``, two numbers of
four bits a byte, times a power of two per 32 in-features in ``x_scales``, transposed in the model.

Legend: E experts, O out, I in, R and G rows and columns of scales.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moeq.checkpoint.affine import (
    CHUNK,
    Dequantized,
    Readable,
    as_matrix,
    dequantize,
    grid_of,
    matrix_shape,
    parts_of,
)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")
# Of four bits, by code: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def read_fp8(
    stored: Mapping[str, Readable], description: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Dequantized]]:
    """Weights in float8 by key, dequantized; see ``moeq.checkpoint.dequantized``.

    Raises:
        ValueError: A weight has no scales, or scales that do not cover it.
    """
    size = description.get("weight_block_size")
    block = (int(size[0]), int(size[1])) if size else None
    for key, tensor in stored.items():
        if tensor.dtype in FLOAT8:
            scale = next((stored[key + ending] for ending in SCALES if key + ending in stored), None)
            if scale is None:
                raise ValueError(f"{key} is float8 and has no {key}_scale_inv; copy the source again")
            yield key, scaled(key, tensor, scale, block, dtype)


def scaled(
    key: str,
    values: Readable,
    scale: Readable,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
    zero: Readable | None = None,
) -> Dequantized:
    """A weight of numbers that are stored one by one, with a scale per matrix, row, group or block.

    Args:
        key: Of the weight.
        values: [O, I], or [E, O, I].
        scale: One number, [O], or [R, G], with E in front where the values have it.
        block: Rows and columns of a scale where the last may be cut.
        dtype: Of the weight.
        zero: As the scales; None is 0.

    Raises:
        ValueError: The scales do not cover the weight.
    """
    stacked = len(values.shape) == 3
    scale_shape = matrix_shape(scale.shape[1:] if stacked and len(scale.shape) > 1 else scale.shape)
    if stacked and len(scale.shape) < 2:
        scale_shape = (1, 1)  # one number, or one per expert
    row_O, group_I = grid_of(key, values.shape[-2:], scale_shape, block)

    def make() -> Tensor:
        numbers, scales = values.read(), _numbers(scale.read())
        zeros = None if zero is None else as_matrix(zero.read())
        if not stacked:
            return dequantize(numbers, as_matrix(scales), zeros, row_O, group_I, dtype)
        count = numbers.shape[0]
        by_expert = scales.reshape(-1, *scale_shape).expand(count, *scale_shape)
        weight = torch.empty(values.shape, dtype=dtype)
        for expert in range(count):
            weight[expert] = dequantize(numbers[expert], by_expert[expert], None, row_O, group_I, dtype)
        return weight

    return Dequantized(key, dtype, values.shape, parts_of(values, scale, zero), make)


def _numbers(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are powers of two."""
    return power_of_two(scale) if scale.dtype == torch.uint8 else scale.float()


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** (byte - 127) as float32; 255 is no number."""
    return exponent.view(torch.float8_e8m0fnu).float()


def read_mxfp4(
    stored: Mapping[str, Readable], description: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Dequantized]]:
    """Weights in MXFP4 by key, dequantized; see ``moeq.checkpoint.dequantized``.

    Raises:
        ValueError: A weight has no scales, or blocks of another layout.
    """
    del description
    for key, blocks in stored.items():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        scales = stored.get(f"{name}_scales")
        if scales is None or blocks.dtype != torch.uint8 or scales.shape != blocks.shape[:-1] or len(scales.shape) != 3:
            raise ValueError(f"{key} needs bytes [E, O, G, 16], and bytes [E, O, G] in {name}_scales")
        yield name, _mxfp4(name, blocks, scales, dtype)


def _mxfp4(name: str, blocks: Readable, scales: Readable, dtype: torch.dtype) -> Dequantized:
    num_experts, num_out, num_groups, num_octets = blocks.shape
    num_in = num_groups * num_octets * 2

    def make() -> Tensor:
        numbers, octets, exponents = torch.tensor(E2M1), blocks.read(), scales.read()
        weight_EIO = torch.empty(num_experts, num_in, num_out, dtype=dtype)
        step = max(1, CHUNK // num_in)
        for expert in range(num_experts):
            for start in range(0, num_out, step):
                part = slice(start, start + step)
                pairs = octets[expert, part]
                codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)  # the low one comes first
                values = numbers[codes.int()] * power_of_two(exponents[expert, part])[..., None]
                weight_EIO[expert, :, part] = values.flatten(-2).T
        return weight_EIO

    return Dequantized(name, dtype, (num_experts, num_in, num_out), parts_of(blocks, scales), make)
