"""Fisher information: squared gradients of the log-likelihood at the output of every linear.

    G_o = mean over tokens of (d/dz_o sum_t log p(y_t | x_<=t))^2,     y_t drawn from p(. | x_<=t)

With y drawn from the model itself the expectation is the Fisher information, which is the curvature of the KL
divergence; terms of different t have mean zero and add up.  With y the next token of the data it is the "empirical"
variant (GEMQ uses it, at the outputs of the blocks).

The parameters are not trained and get no gradient: only activations carry one.  For a routed expert z is the output of
its own linears inside the experts module, so the routing weight is part of the gradient.

Shapes: B batch, T tokens of a sequence, V vocabulary, E experts, O out features, N tokens of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeq.models.adapter import Adapter, Site
from moeq.models.experts import activate, project_down, project_in
from moeq.models.observe import experts_run_by
from moeq.models.routed_rows import routed_tokens


@dataclass(frozen=True)
class GradientState:
    """Running sums over the tokens of one site; they add up over batches and over ranks.

    Attributes:
        sum_EO: float64, squared gradients.
        num_tokens_E: float64, tokens.
    """

    sum_EO: Tensor
    num_tokens_E: Tensor


def empty_gradients(site: Site, device: torch.device | str) -> GradientState:
    """Sums over no token."""
    sums = torch.zeros(site.num_experts, sum(site.rows), dtype=torch.float64, device=device)
    return GradientState(sums, torch.zeros(site.num_experts, dtype=torch.float64, device=device))


def sampled_tokens(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """A token for every position from the model's own prediction, int64 [B, T]; the generator is one of the CPU."""
    cumulative_BTV = logits_BTV.float().softmax(-1).cumsum_(-1)
    level_BT1 = torch.rand(*logits_BTV.shape[:2], 1, generator=generator).to(logits_BTV.device)
    # Scaled by the last entry, which rounding keeps from being 1; strictly below it, so that an index always exists.
    ids_BT1 = torch.searchsorted(cumulative_BTV, level_BT1 * cumulative_BTV[..., -1:], right=True)
    return ids_BT1.squeeze(-1).clamp_max_(logits_BTV.shape[-1] - 1)


def next_tokens(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The next token of the data at every position, int64 [B, T], and where there is one, bool [B, T].

    Args:
        inputs: Batch with ``input_ids`` and perhaps ``attention_mask``; padding has no next token and is none.
    """
    ids_BT, counted_BT = inputs["input_ids"].roll(-1, 1), counted_tokens(inputs)
    counted_BT = counted_BT & counted_BT.roll(-1, 1)
    counted_BT[:, -1] = False
    return ids_BT, counted_BT


def counted_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Which tokens of a batch are no padding, bool [B, T]."""
    mask_BT = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask_BT is None else mask_BT.bool()


@torch.no_grad()
def score_gradient(logits_BTV: Tensor, ids_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Gradient of the summed log-likelihood of tokens in the logits, in their dtype, [B, T, V]; padding does not count.

    The gradient of log softmax at y is onehot(y) - p: no graph of the log-probabilities is needed.
    """
    gradient_BTV = logits_BTV.detach().float().softmax(-1).neg_()
    gradient_BTV.scatter_add_(-1, ids_BT.unsqueeze(-1), torch.ones_like(gradient_BTV[..., :1]))
    gradient_BTV *= counted_BT.unsqueeze(-1)
    return gradient_BTV.to(logits_BTV.dtype)


# Called with a site, the expert, the rows of the site's stacked weight and the gradients [N, rows] of its tokens.
OnGradient = Callable[[Site, int, slice, Tensor], None]
# Called with a site, the expert and the inputs [N, I] of its tokens.
OnInput = Callable[[Site, int, Tensor], None]


@contextmanager
def observe_gradients(
    adapter: Adapter,
    sites: Sequence[Site],
    on_gradient: OnGradient,
    keep_N: Tensor | None,
    on_input: OnInput | None = None,
) -> Iterator[None]:
    """Hand over the gradients at the outputs of the sites in every backward pass inside.

    Args:
        adapter: The model.
        sites: Sites of any blocks.
        on_gradient: What to do with them.
        keep_N: Which tokens of the batch are no padding; None is all.
        on_input: What to do with the inputs of the same tokens, in every forward pass; None is nothing.
    """
    by_experts: dict[str, list[Site]] = {}
    with ExitStack() as stack:
        for site in sites:
            if site.kind == "routed":
                by_experts.setdefault(site.modules[0], []).append(site)
            else:
                _hook_linears(stack, adapter, site, on_gradient, keep_N, on_input)
        for path, pair in by_experts.items():
            module = adapter.model.get_submodule(path)
            stack.enter_context(_differentiable_experts(module, pair, on_gradient, keep_N, on_input))
        yield


def add_squares(states: dict[str, GradientState]) -> OnGradient:
    """An ``on_gradient`` that adds up squares by site name."""

    def on_gradient(site: Site, expert: int, rows: slice, gradient_NO: Tensor) -> None:
        state = states[site.name]
        state.sum_EO[expert, rows] += gradient_NO.float().square().sum(0).double()
        if rows.start == 0:
            state.num_tokens_E[expert] += len(gradient_NO)

    return on_gradient


def _hook_linears(
    stack: ExitStack, adapter: Adapter, site: Site, on_gradient: OnGradient, keep_N: Tensor | None,
    on_input: OnInput | None,
) -> None:  # fmt: skip
    start = 0
    for path, num_rows in zip(site.modules, site.rows, strict=True):
        rows = slice(start, start + num_rows)
        start += num_rows

        def kept(value: Tensor) -> Tensor:
            flat = value.detach().reshape(-1, value.shape[-1])
            return flat if keep_N is None else flat[keep_N]

        def on_output(_: nn.Module, args: Any, output: Tensor, rows: slice = rows) -> None:
            def on_backward(gradient: Tensor) -> None:
                on_gradient(site, 0, rows, kept(gradient))

            if on_input is not None and rows.start == 0:
                on_input(site, 0, kept(args[0]))
            if output.requires_grad:
                output.register_hook(on_backward)

        stack.callback(adapter.model.get_submodule(path).register_forward_hook(on_output).remove)


@contextmanager
def _differentiable_experts(
    module: Any, sites: Sequence[Site], on_gradient: OnGradient, keep_N: Tensor | None, on_input: OnInput | None
) -> Iterator[None]:
    with experts_run_by("moeq_gradients", module):
        module.moeq_gradients = ({site.stage: site for site in sites}, on_gradient, keep_N, on_input)
        try:
            yield
        finally:
            del module.moeq_gradients


def _gradient_forward(module: Any, hidden_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    sites, on_gradient, keep_N, on_input = module.moeq_gradients
    out_ND = torch.zeros_like(hidden_ND)
    for expert, tokens, slots in routed_tokens(ids_NK, module.num_experts, None):
        counted = slice(None) if keep_N is None else keep_N[tokens]

        def watch(x: Tensor, output: Tensor, stage: str, expert: int = expert, counted: Any = counted) -> Tensor:
            def on_backward(gradient: Tensor) -> None:
                on_gradient(sites[stage], expert, slice(0, gradient.shape[1]), gradient[counted])

            if on_input is not None and stage in sites:
                on_input(sites[stage], expert, x.detach()[counted])
            if output.requires_grad and stage in sites:
                output.register_hook(on_backward)
            return output

        x_ND = hidden_ND[tokens]
        inner = activate(module, watch(x_ND, project_in(module, expert, x_ND), "mlp_in"))
        y = watch(inner, project_down(module, expert, inner), "mlp_down")
        out_ND = out_ND.index_add(0, tokens, (y * weights_NK[tokens, slots, None]).to(out_ND.dtype))
    return out_ND


ALL_EXPERTS_FUNCTIONS.register("moeq_gradients", _gradient_forward)
