"""KL divergence and top-1 agreement of a model's next-token distribution with the reference's.

KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) in nats, with P the reference (the original model) and Q the model under
evaluation, summed over positions.  Every position of a window counts, the last one too: no target is needed.  Zero
exactly for equal logits.  Unlike perplexity it sees every change of the distribution, also those that happen to
favour the text, so it separates quantization methods with far fewer tokens.

Computed in float32, a chunk of positions at a time.

Shapes: B batch, L tokens of a window, V vocabulary, N positions of a batch of documents.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moeq.scoring.perplexity import CHUNK_TOKENS, row_chunks


def kl_sum_and_agreement(
    reference_logits_BLV: Tensor, logits_BLV: Tensor, mask_BL: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || model) summed over positions, positions with the same most likely token, and positions.

    Args:
        reference_logits_BLV: Logits of the original model, any floating dtype.
        logits_BLV: Logits of the model under evaluation.
        mask_BL: True (or 1) where a position counts; None counts all.

    Returns:
        Float64 (nats), int64 and int64 scalars on the device of the logits.

    Raises:
        ValueError: The two models have different vocabularies.
    """
    _check_shapes(reference_logits_BLV, logits_BLV)
    batch, length = logits_BLV.shape[:2]
    kl_sum = torch.zeros((), dtype=torch.float64, device=logits_BLV.device)
    num_same = torch.zeros((), dtype=torch.int64, device=logits_BLV.device)
    num_positions = torch.zeros((), dtype=torch.int64, device=logits_BLV.device)
    for row, at in row_chunks(batch, length):
        counted_T = torch.ones_like(logits_BLV[row, at, 0], dtype=torch.bool)
        if mask_BL is not None:
            counted_T = mask_BL[row, at].bool()
        log_p_TV = reference_logits_BLV[row, at].to(torch.float32).log_softmax(-1)
        log_q_TV = logits_BLV[row, at].to(torch.float32).log_softmax(-1)
        kl_T = functional.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
        kl_sum += kl_T[counted_T].sum()
        num_same += (log_p_TV.argmax(-1) == log_q_TV.argmax(-1))[counted_T].sum()
        num_positions += counted_T.sum()
    return kl_sum, num_same, num_positions


def divergence_by_owner(
    reference_logits_NV: Tensor, logits_NV: Tensor, owner_N: Tensor, num_owners: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for each document of a batch: sums of KL, positions with the same most likely token, and positions.

    Args:
        reference_logits_NV: Logits of the original model, any floating dtype, on any device.
        logits_NV: Logits of the model under evaluation.
        owner_N: Document of each position.
        num_owners: Number of documents.

    Returns:
        Float64 (nats), int64 and int64, each per owner, on the device of the logits.

    Raises:
        ValueError: The two models have different vocabularies, or did not run the same positions.
    """
    _check_shapes(reference_logits_NV, logits_NV)
    device = logits_NV.device
    owner_N = owner_N.to(device)
    kl_sum = torch.zeros(num_owners, dtype=torch.float64, device=device)
    num_same = torch.zeros(num_owners, dtype=torch.int64, device=device)
    for start in range(0, len(owner_N), CHUNK_TOKENS):
        at = slice(start, start + CHUNK_TOKENS)
        log_p_TV = reference_logits_NV[at].to(device, torch.float32).log_softmax(-1)
        log_q_TV = logits_NV[at].to(torch.float32).log_softmax(-1)
        kl_T = functional.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
        kl_sum.index_add_(0, owner_N[at], kl_T.to(torch.float64))
        num_same.index_add_(0, owner_N[at], (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).long())
    return kl_sum, num_same, owner_N.bincount(minlength=num_owners)


def _check_shapes(reference_logits: Tensor, logits: Tensor) -> None:
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} must have the reference's {tuple(reference_logits.shape)}; "
            "compare a model with the original that it was made from (--model.reference)"
        )
