"""Products with packed weights of several experts on a GPU: one Triton kernel that dequantizes in registers.

A program computes some rows of one expert and some of its outputs.  It finds out by itself which: rows are sorted by
expert, each expert has as many tiles as its rows need, and the program's number is looked up in their sums.  So nothing
is copied to the host, whatever the routing, and the experts of a width take one launch.

Weights are the left operand (outputs x inputs) and come from memory packed: eight codes are ``bits`` bytes, which are
loaded once and shifted apart in registers.  Scale and zero point are applied there, the product is rounded to the dtype
of the scales as everywhere in moeq, so that the numbers multiplied are those of the dequantized model; sums are
float32.

Run so far in Triton's interpreter only (tests/kernels/test_packed_triton.py): speed on a GPU is not known.

Shapes: E experts, O outputs, I inputs, G groups per row, N rows; K octets of codes of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeq.kernels.packed_products import PackedStack, kernel_problem
from moeq.kernels.packed_tiles import Tile, tile_for

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def grouped_product(
    x_TI: Tensor,
    tokens_N: Tensor | None,
    bounds_E2: Tensor,
    stack: PackedStack,
    out_NO: Tensor,
    tile: Tile | None = None,
) -> None:
    """Multiply rows with the weights of their experts; rows of no expert of the stack are left as they are.

    Args:
        x_TI: float32, bfloat16 or float16 inputs, rows contiguous.
        tokens_N: int64, which row of the inputs each row is; None for themselves.
        bounds_E2: int32, on the device: the rows of expert e are [start, stop), in any order of experts.
        stack: The weights.
        out_NO: Written, in its dtype.
        tile: What a program computes; None is the table's.

    Raises:
        ValueError: The kernel does not take the grid.
    """
    if (problem := kernel_problem(stack.bits, stack.group_size, stack.in_features)) is not None:
        raise ValueError(f"no kernel: {problem}; use the twin in torch")
    (num_rows, num_outputs), num_experts = out_NO.shape, len(stack.matrices)
    tile = tile_for(num_rows, num_experts) if tile is None else tile
    # Each expert begins a tile, and no tile is empty.
    num_tiles = min(num_rows, num_rows // tile.rows + num_experts)
    if not num_tiles:
        return
    words = stack.matrices[0].packed_OW.shape[1]
    _grouped_product[triton.cdiv(num_outputs, tile.outputs), num_tiles](
        x_TI, bounds_E2 if tokens_N is None else tokens_N, bounds_E2, stack.places_3E, out_NO, x_TI.stride(0),
        4 * words, *out_NO.stride(), num_experts, num_outputs, stack.in_features, stack.group_size,
        stack.in_features // stack.group_size,
        BITS=stack.bits, SCALE=_DTYPES[stack.dtype], HAS_ZERO=not stack.symmetric, HAS_TOKENS=tokens_N is not None,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=tile.rows, OUTPUTS=tile.outputs, INNER=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _grouped_product(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x, tokens, bounds, places, out, x_t, row_bytes, out_n, out_o,  # noqa: ANN001
    num_experts, num_outputs, num_inputs, group_size, num_groups,  # noqa: ANN001
    BITS: tl.constexpr, SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile: ROWS rows of the expert that the second index falls to, OUTPUTS of its outputs (first index)."""
    number = tl.program_id(1)
    id_E = tl.arange(0, EXPERTS)
    size_E = tl.load(bounds + 2 * id_E + 1, mask=id_E < num_experts, other=0)
    size_E -= tl.load(bounds + 2 * id_E, mask=id_E < num_experts, other=0)
    tiles_E = (size_E + ROWS - 1) // ROWS
    end_E = tl.cumsum(tiles_E, 0)
    expert = tl.sum((end_E <= number).to(tl.int32), 0)
    if expert >= num_experts:
        return
    before = tl.sum(tl.where(id_E < expert, tiles_E, 0), 0)
    row_N = tl.load(bounds + 2 * expert) + (number - before) * ROWS + tl.arange(0, ROWS)
    inside_N = row_N < tl.load(bounds + 2 * expert + 1)
    token_N = tl.load(tokens + row_N, mask=inside_N, other=0).to(tl.int64) if HAS_TOKENS else row_N.to(tl.int64)
    output_O = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists_O = output_O < num_outputs
    # Tensors begin at multiples of 16 bytes (``PackedStack``), which a place read from memory does not tell.
    packed = tl.multiple_of(tl.load(places + expert).to(tl.pointer_type(tl.uint8)), 16)
    packed += output_O[:, None] * row_bytes
    scale = tl.multiple_of(tl.load(places + num_experts + expert).to(tl.pointer_type(SCALE)), 16)
    scale += output_O[:, None] * num_groups
    zero = tl.multiple_of(tl.load(places + 2 * num_experts + expert).to(tl.pointer_type(tl.int32)), 16)
    x += token_N[None, :] * x_t
    sum_ON = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in range(0, num_inputs, INNER):
        octet_K = start // 8 + tl.arange(0, INNER // 8)
        mask_OK = exists_O[:, None] & (8 * octet_K < num_inputs)[None, :]
        group_K = (8 * octet_K) // group_size
        scale_OK = tl.load(scale + group_K[None, :], mask=mask_OK, other=0.0)
        if HAS_ZERO:
            zero_OK = _one_code(zero + group_K[None, :], output_O[:, None] * BITS, num_groups, mask_OK, BITS)
        else:
            zero_OK = tl.full(scale_OK.shape, 2 ** (BITS - 1), dtype=tl.int32)
        code_OKC = _octets(packed, octet_K, mask_OK, BITS)
        level_OKC = (code_OKC - zero_OK[:, :, None]).to(tl.float32)
        weight_OKC = (level_OKC * scale_OK[:, :, None].to(tl.float32)).to(scale_OK.dtype)
        weight_OI = tl.reshape(weight_OKC, (OUTPUTS, INNER)).to(x.dtype.element_ty)
        input_I = start + tl.arange(0, INNER)
        x_IN = tl.load(x + input_I[:, None], mask=(input_I < num_inputs)[:, None] & inside_N[None, :], other=0.0)
        sum_ON = tl.dot(weight_OI, x_IN, sum_ON, input_precision="ieee")
    out += row_N[None, :].to(tl.int64) * out_n + output_O[:, None] * out_o
    tl.store(out, sum_ON.to(out.dtype.element_ty), mask=exists_O[:, None] & inside_N[None, :])


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _octets(packed, octet_K, mask_OK, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Eight codes at a time, int32 [O, K, 8]."""
    code_C = tl.arange(0, 8)
    if BITS == 8:
        places = packed[:, :, None] + 8 * octet_K[None, :, None] + code_C[None, None, :]
        return tl.load(places, mask=mask_OK[:, :, None], other=0).to(tl.int32)
    if BITS == 3:
        places = packed + 3 * octet_K[None, :]
        octet_OK = tl.load(places, mask=mask_OK, other=0).to(tl.int32)
        octet_OK |= tl.load(places + 1, mask=mask_OK, other=0).to(tl.int32) << 8
        octet_OK |= tl.load(places + 2, mask=mask_OK, other=0).to(tl.int32) << 16
    elif BITS == 2:  # what a shift drags in from the sign is masked away
        halves = packed.to(tl.pointer_type(tl.int16), bitcast=True)
        octet_OK = tl.load(halves + octet_K[None, :], mask=mask_OK, other=0).to(tl.int32)
    else:
        words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
        octet_OK = tl.load(words + octet_K[None, :], mask=mask_OK, other=0)
    return (octet_OK[:, :, None] >> (BITS * code_C)[None, None, :]) & (2**BITS - 1)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _one_code(stream, position, stride, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The code at a bit of a stream of int32 words: from the word it starts in and, where it reaches it, the next."""
    word, shift = position // 32, position % 32
    low = tl.load(stream + word * stride, mask=mask, other=0).to(tl.uint32, bitcast=True)
    straddles = shift + BITS > 32
    high = tl.load(stream + (word + 1) * stride, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
    # A shift by 32 is not defined; without a straddle the next word is 0.
    code = (low >> shift.to(tl.uint32)) | (high << tl.where(straddles, 32 - shift, 0).to(tl.uint32))
    return (code & (2**BITS - 1)).to(tl.int32)
