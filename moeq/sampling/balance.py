"""Expert imbalance of a set of token sequences, their likelihood, and signs of degenerate text.

Expert imbalance (MoEQuant, arXiv 2505.03804, equations 3 and 4), shared experts left out because they are always on:

    sigma = (1/L) sum_l sigma_l        sigma_l = sqrt( (1/(E-1)) sum_e (u_l^e - mean_l)^2 )

The paper never states the unit of the usage u.  Its published values (0.005 to 0.09 at E = 64, k = 6) fit the fraction
of *tokens* that select the expert, whose mean is k/E; that is the default.  The share of routed *slots*, k times
smaller, is the other reading.  Algorithm 1 of the paper prints E/(E-1) for 1/(E-1); equation 4 is followed.

Legend: N sequences, T tokens of a sequence, L blocks with routed experts, E routed experts of a block.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Units = Literal["token_fraction", "slot_share"]
DEGENERATE_ZLIB_RATIO = 0.2


def imbalance(counts_LE: Tensor, num_tokens: int, units: Units = "token_fraction") -> Tensor:
    """Sigma of equations 3 and 4, float32; leading dimensions are kept, so [N, L, E] gives sigma_N.

    Args:
        counts_LE: Tokens that chose each expert, [..., L, E], any integer or floating dtype.
        num_tokens: Tokens that were routed, T; for corpus level, counts and tokens summed over the sequences.
        units: What u is: ``token_fraction`` = counts / T, ``slot_share`` = counts / (all choices of the block).
    """
    counts_LE = counts_LE.to(torch.float32)
    usage_LE = counts_LE / (counts_LE.sum(-1, keepdim=True).clamp(min=1) if units == "slot_share" else num_tokens)
    return usage_LE.std(-1, correction=1).mean(-1)


def zlib_ratio(text: str) -> float:
    """Compressed size over size in UTF-8 bytes; near 0 for a loop, 0 for no text at all."""
    data = text.encode()
    return len(zlib.compress(data)) / len(data) if data else 0.0


def is_degenerate(text: str) -> bool:
    """True where zlib compresses the text below 0.2 of its size: a loop, which calibrates nothing."""
    return zlib_ratio(text) < DEGENERATE_ZLIB_RATIO


def degenerate_share(texts: Sequence[str]) -> float:
    """Share of texts that are degenerate."""
    return sum(map(is_degenerate, texts)) / len(texts)


def balance_columns(counts_NLE: Tensor, nll_N: Tensor, length: int, texts: Sequence[str]) -> dict[str, float]:
    """The columns by which two calibration sets of equal size are compared.

    Args:
        counts_NLE: Tokens of each sequence that chose each expert.
        nll_N: Nats of each sequence, summed over its ``length - 1`` predicted tokens.
        length: Tokens of each sequence.
        texts: The sequences as text.

    Returns:
        Sigma of the whole set in both units (over tokens, not a mean over sequences), its mean over single sequences,
        tokens per expert (least used, mean, most used, experts never used), mean nats per token, degenerate share.
    """
    counts_LE = counts_NLE.sum(0)
    num_tokens = counts_NLE.shape[0] * length
    return {
        "sequences": float(counts_NLE.shape[0]),
        "tokens": float(num_tokens),
        "sigma_token_fraction": float(imbalance(counts_LE, num_tokens)),
        "sigma_slot_share": float(imbalance(counts_LE, num_tokens, "slot_share")),
        "sigma_token_fraction_per_sequence": float(imbalance(counts_NLE, length).mean()),
        "tokens_per_expert_min": float(counts_LE.min()),
        "tokens_per_expert_mean": float(counts_LE.float().mean()),
        "tokens_per_expert_max": float(counts_LE.max()),
        "experts_never_used": float((counts_LE == 0).sum()),
        "nll_mean": float(nll_N.double().sum() / (nll_N.numel() * max(length - 1, 1))),
        "degenerate_share": degenerate_share(texts),
    }
