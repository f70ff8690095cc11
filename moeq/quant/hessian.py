"""Hessians of a stack of linears, accumulated from their inputs, each token weighed by a power of its affinity.

    S_e = sum over the tokens t of expert e of c_t^p x_t x_t^T,        H_e = S_e / n_e

c is the number that multiplies the expert's output.  p = 1 is MoEQuant's affinity-guided quantization (AGQ, arXiv
2505.03804, Eq. 18-19), p = 0 plain GPTQ, p = 2 the exact weight for a linear whose output is scaled by c.
GPTQ does not depend on the scale of H, so the factor 2 of a true second derivative is left out.

The product of a batch is float32, the sum over batches float64 and rounded to float32 at the end: then the order of the
batches, and with it the number of ranks, does not matter.  It would otherwise: a last bit of the Hessian turns a tie in
rounding or in act-order, and the feedback of GPTQ carries it on (measured in benchmarks/LOG.md).

Shapes: E experts, I in features, T tokens of one expert.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moeq.quant.together import taken_together

PANEL = 256  # rows of the Hessian that are added at once: 256 x 2048 float32 fit twice into a core's share of the cache


@dataclass(frozen=True)
class HessianState:
    """Running sums over the tokens seen; the tensors are updated in place, and add up over batches and over ranks.

    Attributes:
        sum_EII: float64, sum of c^p x x^T.
        num_tokens_E: float64, tokens.
        affinity_sum_E: float64, sum of c.
        affinity_square_sum_E: float64, sum of c^2.
        weight_sum_E: float64, sum of w = c^p.
        weight_square_sum_E: float64, sum of w^2.
    """

    sum_EII: Tensor
    num_tokens_E: Tensor
    affinity_sum_E: Tensor
    affinity_square_sum_E: Tensor
    weight_sum_E: Tensor
    weight_square_sum_E: Tensor

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order."""
        return [getattr(self, field.name) for field in fields(self)]


def empty_state(num_experts: int, in_features: int, device: torch.device | str) -> HessianState:
    """Sums over no token."""
    counts = [torch.zeros(num_experts, dtype=torch.float64, device=device) for _ in range(5)]
    shape = (num_experts, in_features, in_features)
    return HessianState(torch.zeros(shape, dtype=torch.float64, device=device), *counts)


def accumulate(
    state: HessianState,
    expert_idx: int,
    x_TI: Tensor,
    affinity_T: Tensor | None = None,
    power: float = 1.0,
    pool: HessianState | None = None,
) -> None:
    """Add the tokens of one expert, in place; products in float32 whatever the dtype of the inputs.

    Args:
        state: Sums to add to.
        expert_idx: Which expert (0 for a linear that is not an expert).
        x_TI: Inputs of the linear, one row per token; no row is a valid input.
        affinity_T: Not negative, in the order of the rows; None is 1 for every token.
        power: p.
        pool: Sums over all experts (E = 1), which get the same; one product serves both.
    """
    alike = affinity_T is None or power == 0
    affinity_T = torch.ones(len(x_TI), device=x_TI.device) if affinity_T is None else affinity_T.to(x_TI.device)
    weight_T = affinity_T.float().pow(power)
    rows_TI = x_TI.float() if alike else x_TI.float() * weight_T.sqrt().unsqueeze(1)
    counts = [torch.tensor(float(len(x_TI)), dtype=torch.float64, device=x_TI.device)]
    for value_T in (affinity_T.double(), weight_T.double()):
        counts += [value_T.sum(), value_T.square().sum()]
    totals = [(state, expert_idx)] if pool is None else [(state, expert_idx), (pool, 0)]
    _add_gram([total.sum_EII[index] for total, index in totals], rows_TI)
    for total, index in totals:
        for tensor, addend in zip(total.tensors()[1:], counts, strict=True):
            tensor[index] += addend


def _add_gram(sums: list[Tensor], rows_TI: Tensor) -> None:
    """Add x^T x to each sum: half of the product, panel by panel while a panel is in cache; the rest is mirrored."""
    width = rows_TI.shape[1] if taken_together(rows_TI.device) else PANEL
    for start in range(0, rows_TI.shape[1], width):
        panel = slice(start, min(start + width, rows_TI.shape[1]))
        product_II = rows_TI[:, panel].mT @ rows_TI[:, : panel.stop]
        square_II = product_II[:, start:]  # not every matrix library returns it symmetric to the last bit
        square_II.copy_(square_II.tril() + square_II.tril(-1).mT)
        for sum_II in sums:
            sum_II[panel, : panel.stop] += product_II
            sum_II[:start, panel] = sum_II[panel, :start].mT


def effective_samples(state: HessianState) -> Tensor:
    """Kish's effective sample size ``(sum c)^2 / sum c^2`` of each expert, float64; 0 where no token was seen."""
    square_E = state.affinity_square_sum_E
    return torch.where(square_E > 0, state.affinity_sum_E.square() / square_E, 0.0)


def mean_hessian(state: HessianState) -> Tensor:
    """Mean over the tokens of each expert, float32 [E, I, I]; zero where no token was seen."""
    mean_EII = torch.empty_like(state.sum_EII, dtype=torch.float32)
    return torch.div(state.sum_EII, state.num_tokens_E.clamp_min(1.0).view(-1, 1, 1), out=mean_EII)
