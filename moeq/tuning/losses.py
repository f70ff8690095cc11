"""How far predictions are from the original's, and the gradient at the logits.

    kl      mean over tokens of sum_v p(v) (log p(v) - log q(v)),        gradient  q - p
    top_k   the same over k + 1 outcomes: the k likeliest tokens of the original, and any other one,
            gradient  q(v) - p(v) among the k,  q(v) (1 - p_rest / q_rest)  elsewhere
    hidden  mean over tokens of |h - h_original|^2 / |h_original|^2

with p of the original and q of the model, in nats.  Gradients are written down rather than recorded: a graph of
log-probabilities would hold the vocabulary several times over.

Shapes: N tokens, V vocabulary, K tokens of the top.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def kl_and_gradient(original_NV: Tensor, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(original || model) summed over tokens, float32 (nats), and its gradient at the logits, float32 [N, V]."""
    log_p_NV = original_NV.float().log_softmax(-1)
    log_q_NV = logits_NV.float().log_softmax(-1)
    p_NV = log_p_NV.exp()
    total = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV)).sum()
    return total, log_q_NV.exp_().sub_(p_NV)


@torch.no_grad()
def top_k_and_gradient(original_NV: Tensor, logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same over the original's k likeliest tokens and the rest as one outcome; a lower bound of the divergence."""
    top_NK = original_NV.topk(min(k, original_NV.shape[-1]), -1).indices
    p_NK = original_NV.float().log_softmax(-1).gather(-1, top_NK).exp_()
    q_NV = logits_NV.float().softmax(-1)
    q_NK = q_NV.gather(-1, top_NK)
    p_rest_N1 = (1.0 - p_NK.sum(-1, keepdim=True)).clamp_(min=0.0)
    q_rest_N1 = (1.0 - q_NK.sum(-1, keepdim=True)).clamp_(min=1e-6)  # of float32: what is left of a sum near 1
    total = torch.xlogy(p_NK, p_NK / q_NK.clamp_min(TINY)).sum()
    total += torch.xlogy(p_rest_N1, p_rest_N1 / q_rest_N1).sum()
    gradient_NV = q_NV * (1.0 - p_rest_N1 / q_rest_N1)
    return total, gradient_NV.scatter_(-1, top_NK, q_NK - p_NK)


def hidden_error(hidden_ND: Tensor, original_ND: Tensor) -> Tensor:
    """Relative squared error summed over tokens; differentiable in the hidden states."""
    original_ND = original_ND.float()
    energy_N = original_ND.square().sum(-1).clamp_min(TINY)
    return ((hidden_ND.float() - original_ND).square().sum(-1) / energy_N).sum()
