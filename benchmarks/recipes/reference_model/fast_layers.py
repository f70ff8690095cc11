"""Two hand-written forward/backward pairs that make training of a small MoE on a CPU several times faster.

Products are in bfloat16 where autocast is, in float32 elsewhere (a CPU without bfloat16 products emulates them).

``routed_swiglu`` runs the routed experts: tokens are sorted by expert into segments padded to a multiple of
``SEGMENT`` rows, because the CPU matrix library compiles and caches one kernel per shape and the number of tokens of
an expert changes at every step.  ``linear_cross_entropy`` computes the loss of the head 512 tokens at a time,
so that the [tokens, vocabulary] float32 logits never leave the cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEGMENT = 64
CHUNK = 512


def _product_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


class _RoutedSwiGLU(torch.autograd.Function):
    """Legend: T tokens, K experts per token, E experts, D model width, F expert width, P rows of padded segments."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        flat = ids_TK.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=gate_up.shape[0])
        padded = (counts + SEGMENT - 1) // SEGMENT * SEGMENT
        start = padded.cumsum(0) - padded
        row = torch.arange(flat.numel()) + (start - counts.cumsum(0) + counts)[flat[order]]
        token = order // ids_TK.shape[1]
        segments = list(zip(start.tolist(), (start + padded).tolist(), strict=True))
        dtype = _product_dtype()
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        x_PD = torch.zeros(int(padded.sum()), x_TD.shape[1], dtype=dtype)
        x_PD.index_copy_(0, row, x_TD.to(dtype).index_select(0, token))
        h_P2F = _segmented_mm(x_PD, gate_up.mT, segments)
        gate, up = h_P2F.chunk(2, 1)
        act_PF = F.silu(gate) * up
        y = _segmented_mm(act_PF, down.mT, segments).index_select(0, row).float()
        weights = weights_TK.flatten()[order].float().unsqueeze(1)
        out = torch.zeros(x_TD.shape).index_add_(0, token, y * weights)
        ctx.save_for_backward(x_PD, h_P2F, act_PF, y, weights, gate_up, down, row, token, order)
        ctx.segments, ctx.dtypes, ctx.weights_shape = segments, (x_TD.dtype, weights_TK.dtype), weights_TK.shape
        return out.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, h_P2F, act_PF, y, weights, gate_up, down, row, token, order = ctx.saved_tensors
        grad = grads[0].float().index_select(0, token)
        d_weights = torch.empty(order.numel()).index_copy_(0, order, (grad * y).sum(1)).view(ctx.weights_shape)
        dy_PD = torch.zeros_like(x_PD).index_copy_(0, row, (grad * weights).to(x_PD.dtype))
        d_act = _segmented_mm(dy_PD, down, ctx.segments)
        gate, up = h_P2F.chunk(2, 1)
        sigmoid = torch.sigmoid(gate)
        d_gate = d_act * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        dh_P2F = torch.cat([d_gate, d_act * gate * sigmoid], 1)
        dx_PD = _segmented_mm(dh_P2F, gate_up, ctx.segments)
        dx_TD = torch.zeros(grads[0].shape).index_add_(0, token, dx_PD.index_select(0, row).float())
        d_down = _segmented_outer(dy_PD, act_PF, ctx.segments)
        d_gate_up = _segmented_outer(dh_P2F, x_PD, ctx.segments)
        return dx_TD.to(ctx.dtypes[0]), None, d_weights.to(ctx.dtypes[1]), d_gate_up, d_down


def _segmented_mm(rows: Tensor, matrices: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    out = rows.new_empty(rows.shape[0], matrices.shape[-1])
    for matrix, (a, b) in zip(matrices, segments, strict=True):
        if b > a:
            torch.mm(rows[a:b], matrix, out=out[a:b])
    return out


def _segmented_outer(left: Tensor, right: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    out = left.new_zeros(len(segments), left.shape[1], right.shape[1])
    for matrix, (a, b) in zip(out, segments, strict=True):
        if b > a:
            torch.mm(left[a:b].t(), right[a:b], out=matrix)
    return out.float()


def routed_swiglu(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts implementation for transformers: gated SiLU experts with fused ``gate_up_proj`` [E, 2F, D]."""
    args = (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj)
    out: Tensor = _RoutedSwiGLU.apply(*args)  # type: ignore[no-untyped-call]
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        dtype = _product_dtype()
        x_TD, weight = x_TD.to(dtype), weight_VD.to(dtype)
        dx, dw, loss = torch.empty_like(x_TD), torch.zeros_like(weight_VD), torch.zeros(())
        for a in range(0, len(x_TD), CHUNK):
            x, target = x_TD[a : a + CHUNK], target_T[a : a + CHUNK].unsqueeze(1)
            log_prob = (x @ weight.t()).float().log_softmax(1)
            loss -= log_prob.gather(1, target).sum()
            grad = log_prob.exp_().scatter_add_(1, target, torch.full(target.shape, -1.0))
            grad = grad.mul_(1 / len(x_TD)).to(dtype)
            torch.mm(grad, weight, out=dx[a : a + CHUNK])
            dw += grad.t() @ x
        ctx.save_for_backward(dx, dw)
        return loss / len(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx * grads[0], dw * grads[0], None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean over tokens of the cross-entropy (nats) of ``x @ weight.T``, without keeping the logits."""
    loss: Tensor = _LinearCrossEntropy.apply(x_TD, weight_VD, target_T)  # type: ignore[no-untyped-call]
    return loss
