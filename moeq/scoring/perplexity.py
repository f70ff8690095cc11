"""Negative log-likelihood of windows of text, from which perplexity = exp(nll_sum / num_tokens).

Protocol: the text is cut into non-overlapping windows of a stated length; token i+1 is predicted from tokens 0..i of
its own window, so the first token of each window is not scored and every other token is scored once; the sum runs
over all scored tokens before the one division, so that windows and batches may have any size.  This is the usual
WikiText protocol of the GPTQ papers (there with windows of 2048 tokens).

Cross-entropy is computed in float32 from logits of any dtype, a chunk of tokens at a time: float32 logits of a whole
batch (B * L * V * 4 bytes) never exist.  A softmax followed by a logarithm would overflow for unlikely targets.

Shapes: B batch, L tokens of a window, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 512


def row_chunks(batch: int, length: int) -> Iterator[tuple[int, slice]]:
    """(row, positions) pairs that cover [batch, length] in slices of at most ``CHUNK_TOKENS``, without any copy."""
    for row in range(batch):
        for start in range(0, length, CHUNK_TOKENS):
            yield row, slice(start, min(start + CHUNK_TOKENS, length))


def nll_sum_and_count(logits_BLV: Tensor, input_ids_BL: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over scored tokens of -log P(token | tokens before it in its window), in nats, and their number.

    Args:
        logits_BLV: Logits of any floating dtype; position i predicts token i+1, the last position is not used.
        input_ids_BL: The tokens.
        mask_BL: True (or 1) where a token is scored as a target; None scores all but the first of each row.

    Returns:
        Float64 and int64 scalars on the device of the logits.
    """
    nll_sum = torch.zeros((), dtype=torch.float64, device=logits_BLV.device)
    num_tokens = torch.zeros((), dtype=torch.int64, device=logits_BLV.device)
    batch, length = input_ids_BL.shape
    for row, at in row_chunks(batch, length - 1):
        targets_T = input_ids_BL[row, 1:][at]
        if mask_BL is not None:
            targets_T = targets_T.masked_fill(~mask_BL[row, 1:][at].bool(), -100)
        logits_TV = logits_BLV[row, at].to(torch.float32)
        nll_sum += functional.cross_entropy(logits_TV, targets_T, ignore_index=-100, reduction="sum")
        num_tokens += (targets_T != -100).sum()
    return nll_sum, num_tokens
