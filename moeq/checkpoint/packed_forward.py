"""The implementation of experts on prepared weights, registered with transformers under ``IMPLEMENTATION``.

Rows are sorted by their experts, and each projection of those that are hit is a product of the device
(``moeq.checkpoint.forms``).  Gate function, biases and the order of weights are the family's.

Shapes: N tokens, K top-k, S = N K rows, D hidden, F expert width, O out.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeq.checkpoint.forms import GROUPED
from moeq.checkpoint.gpu_forward import forward_by_kernel, stacks_of
from moeq.checkpoint.packed import IMPLEMENTATION, PackedExpert, PackedExperts
from moeq.models.experts import ExpertSide, activate, stacked_bias


def packed_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [N, D].

    Args:
        experts: Packed ones; others (of a block that is not packed) run by transformers' grouped products.
        hidden_states: [N, D].
        top_k_index: int64, [N, K]; an index of ``num_experts`` (a slot of another rank) is skipped.
        top_k_weights: [N, K].
    """
    if not isinstance(experts, PackedExperts):
        output_ND: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
        return output_ND
    by_reference = hidden_states.requires_grad and torch.is_grad_enabled()
    if hidden_states.is_cuda and not by_reference and (stacks := stacks_of(experts)) is not None:
        return forward_by_kernel(experts, stacks, hidden_states, top_k_index, top_k_weights)
    top_k = top_k_index.shape[1]
    ids_S, order_S = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(ids_S, minlength=len(experts)).tolist()[: len(experts)]
    hit = [expert for expert, count in enumerate(counts) if count]
    counts, num_here = [counts[expert] for expert in hit], sum(counts)
    order_S, ids_S = order_S[:num_here], ids_S[:num_here]
    z_SO = _products(experts, "into", hidden_states[order_S // top_k], ids_S, hit, counts)
    y_SD = _products(experts, "down", activate(experts, z_SO), ids_S, hit, counts)
    weighted_SD = y_SD * top_k_weights.flatten()[order_S].unsqueeze(1)
    sorted_back_SD = weighted_SD.new_zeros(top_k_index.numel(), y_SD.shape[1])
    sorted_back_SD[order_S] = weighted_SD
    return sorted_back_SD.unflatten(0, (-1, top_k)).sum(1).to(hidden_states.dtype)


def _products(
    experts: PackedExperts, part: ExpertSide, x_SI: Tensor, ids_S: Tensor, hit: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Products of all rows with a part of their experts, gate before up, and its biases; [S, O]."""
    inside = [cast(PackedExpert, experts[expert]) for expert in hit]
    products = [expert.down_proj if part == "down" else expert.into for expert in inside]
    z_SO = GROUPED[x_SI.device.type](products, x_SI, counts)
    bias_EO = stacked_bias(experts, part)
    return z_SO if bias_EO is None else z_SO + bias_EO[ids_S]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, packed_forward)
