"""Products of rows with packed weights of several experts, each row with its own expert's: shapes, support, torch twin.

    out_n = x_token(n) W_e^T,    W_e = ((code - zero point) * scale), rounded to the dtype of the scales

for the rows n of expert e.  Weights are as their files hold them: codes are a little-endian stream of bits along the
inputs, zero points one along the outputs (``moeq.quant.packing``), both in int32 words.  A linear is a stack of one
expert.  The kernel is in ``packed_triton``; this file imports no triton.

Shapes: E experts of a stack, O out features, I in features, G groups per row, W words, T tokens, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KERNEL_BITS = (2, 3, 4, 8)
OCTET = 8  # codes that fill whole bytes at every width
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class PackedMatrix:
    """One packed weight, by the tensors that a checkpoint stores.

    Attributes:
        packed_OW: int32, codes.
        scale_OG: In the dtype that the weight has.
        zero_WG: int32, zero points packed along O; None for a symmetric grid (zero point 2^(bits - 1)).
    """

    packed_OW: Tensor
    scale_OG: Tensor
    zero_WG: Tensor | None


@dataclass(frozen=True)
class PackedStack:
    """Weights of experts that share shape and grid, wherever each of them lies in memory: nothing is copied.

    Attributes:
        matrices: Of each expert; tensors are contiguous and begin at multiples of ``ALIGNMENT``.
        places_3E: int64, on their device: where codes, scales and zero points of each expert are.
        bits: Bits per code.
        in_features: I.
    """

    matrices: tuple[PackedMatrix, ...]
    places_3E: Tensor
    bits: int
    in_features: int

    @classmethod
    def of(cls, matrices: Sequence[PackedMatrix], bits: int, in_features: int) -> "PackedStack":
        """The stack of some weights.

        Raises:
            ValueError: A tensor is not contiguous or not aligned.
        """
        columns = []
        for matrix in matrices:
            zero_WG = matrix.packed_OW if matrix.zero_WG is None else matrix.zero_WG  # not read
            tensors = (matrix.packed_OW, matrix.scale_OG, zero_WG)
            if not all(t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 for t in tensors):
                raise ValueError(f"packed weights must be contiguous from a multiple of {ALIGNMENT} bytes; clone them")
            columns.append([tensor.data_ptr() for tensor in tensors])
        places_3E = torch.tensor(columns, dtype=torch.int64).T.contiguous()
        return cls(tuple(matrices), places_3E.to(matrices[0].packed_OW.device), bits, in_features)

    @property
    def out_features(self) -> int:
        """O."""
        return self.matrices[0].packed_OW.shape[0]

    @property
    def group_size(self) -> int:
        """In features per scale."""
        return self.in_features // self.matrices[0].scale_OG.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.matrices[0].scale_OG.dtype

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.matrices[0].zero_WG is None


def kernel_problem(bits: int, group_size: int, in_features: int) -> str | None:
    """Why the kernel does not take a grid; None where it does."""
    if bits not in KERNEL_BITS:
        return f"{bits} bits are none of {', '.join(map(str, KERNEL_BITS))}"
    if in_features % OCTET or group_size % OCTET:
        return f"rows of {in_features} in groups of {group_size} are no multiples of {OCTET}"
    return None


def grouped_product_by_torch(
    x_TI: Tensor, tokens_N: Tensor | None, bounds_E2: Tensor, stack: PackedStack, out_NO: Tensor
) -> None:
    """The twin of ``packed_triton.grouped_product``: one expert after another, summed in float32.

    Args: See there.
    """
    for expert, (start, stop) in enumerate(bounds_E2.tolist()):
        if stop > start:
            chosen = slice(start, stop) if tokens_N is None else tokens_N[start:stop]
            weight_OI = dequantized(stack, expert).to(x_TI.dtype)
            out_NO[start:stop] = (x_TI[chosen].float() @ weight_OI.float().mT).to(out_NO.dtype)


def dequantized(stack: PackedStack, expert: int) -> Tensor:
    """The weight of one expert, [O, I]."""
    matrix = stack.matrices[expert]
    code_OI = _stream(matrix.packed_OW, stack.bits, stack.in_features)
    if matrix.zero_WG is None:
        level_OI = code_OI - 2 ** (stack.bits - 1)
    else:
        zero_OG = _stream(matrix.zero_WG.mT, stack.bits, stack.out_features).mT
        level_OI = code_OI - zero_OG.repeat_interleave(stack.group_size, 1)
    scale_OI = matrix.scale_OG.float().repeat_interleave(stack.group_size, 1)
    return (level_OI.float() * scale_OI).to(stack.dtype)


def _stream(words: Tensor, bits: int, num: int) -> Tensor:
    """The first ``num`` codes of streams [..., W], int64: each from the word it starts in and the next one."""
    position = torch.arange(num, device=words.device) * bits
    first, shift = position // 32, position % 32
    unsigned = words.long() & 0xFFFFFFFF
    low = unsigned[..., first] >> shift
    high = unsigned[..., (first + 1).clamp_max(words.shape[-1] - 1)] << (32 - shift)
    return (low | high) & (2**bits - 1)
