"""How far a model's next-token distribution is from the reference's: KL divergence and top-1 agreement.

KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) in nats, with P the reference (the original model) and Q the model under
evaluation, summed over positions.  Every position of a window counts, the last one too: no target is needed.  Zero
exactly for equal logits.  Unlike perplexity it sees every change of the distribution, also those that happen to
favour the text, so it separates quantization methods with far fewer tokens.

Computed in float32, a chunk of positions at a time.  Shapes: B batch, L tokens of a window, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moeq.tasks.perplexity import row_chunks


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
    if reference_logits_BLV.shape != logits_BLV.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_BLV.shape)} must have the reference's {tuple(reference_logits_BLV.shape)}; "
            "compare a model with the original that it was made from"
        )
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
