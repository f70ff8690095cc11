"""The loss of a batch and its gradient at the last hidden states, a few sequences of logits at a time.

Shapes: B batch, T tokens of a sequence, V vocabulary, N tokens.
"""

import torch
from torch import Tensor

from moeq.models.adapter import Adapter
from moeq.models.head import logits_behind
from moeq.tuning.losses import hidden_error, kl_and_gradient, top_k_and_gradient
from moeq.tuning.tuning_spec import TuningSpec

# Logits of so many numbers are made at once, one sequence at least.
LOGITS_AT_ONCE = 1 << 20


def loss_and_gradient(
    adapter: Adapter, ids_BT: Tensor, last: Tensor, original: Tensor, spec: TuningSpec
) -> tuple[Tensor, Tensor]:
    """The loss summed over tokens, a float32 scalar, and its gradient at the last hidden states, in their dtype.

    Args:
        adapter: The model, whose head is the original's.
        ids_BT: The tokens.
        last: Last hidden states, [B, T, ...].
        original: Those of the original.
        spec: Which loss.
    """
    vocabulary = adapter.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    rows = max(1, LOGITS_AT_ONCE // (vocabulary * ids_BT.shape[1]))
    total = torch.zeros((), device=last.device)
    gradients = []
    for ids_RT, part, wanted in zip(ids_BT.split(rows), last.split(rows), original.split(rows), strict=True):
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            if spec.loss == "hidden":
                error = hidden_error(leaf, wanted)
                (gradient,) = torch.autograd.grad(error, leaf)
                total += error.detach()
            else:
                logits_RTV = logits_behind(adapter.model, adapter.blocks, {"input_ids": ids_RT}, leaf)
                with torch.no_grad():
                    wanted_RTV = logits_behind(adapter.model, adapter.blocks, {"input_ids": ids_RT}, wanted)
                value, at_logits_NV = _of_logits(wanted_RTV.flatten(0, 1), logits_RTV.detach().flatten(0, 1), spec)
                total += value
                back = at_logits_NV.to(logits_RTV.dtype).view_as(logits_RTV)
                (gradient,) = torch.autograd.grad(logits_RTV, leaf, back)
        gradients.append(gradient)
    return total, torch.cat(gradients)


def _of_logits(original_NV: Tensor, logits_NV: Tensor, spec: TuningSpec) -> tuple[Tensor, Tensor]:
    if spec.loss == "top_k":
        return top_k_and_gradient(original_NV, logits_NV, spec.top_k)
    return kl_and_gradient(original_NV, logits_NV)
