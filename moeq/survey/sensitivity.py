"""Sensitivity of a weight: from its error D = W - dequantized W to numbers that an allocator may add up.

With x the inputs of the linear, H = mean of x x^T over the tokens of its expert, and n / N the share of tokens that
the expert sees:

    hessian  n/N tr(D H D^T) / sum over the experts of the layer of n/N tr(W H W^T)
    fisher   n/N 1/2 sum_o G_o (D H D^T)_oo,     G_o = mean over the expert's tokens of (d log p(y) / d z_o)^2
    pmq      (n/N)^alpha * (mean routing weight)^beta * |change of the block's output|^gamma      (MC-MoE, 2410.06270)

``hessian`` is the share of the energy of a layer's output that becomes noise (H with the solver's affinity weights): it
adds up over the experts of a layer; adding layers says that equal relative errors are equally bad, which is a guess.
``fisher`` is in nats per token everywhere: the second-order term of KL(original || quantized).  z is the linear's
output, y a token drawn from the model's own prediction, so E[(d log p / d z)(d log p / d z)^T] is the curvature of the
KL.  Outputs are taken as uncorrelated with each other, gradients as independent of inputs, and errors of different
tokens and weights as uncorrelated.  Errors of one bit are too large for a second-order term: they count ``ONE_BIT``
times.

Shapes: E experts, O out features, I in features.
"""

import torch
from torch import Tensor

from moeq.quant.gptq import gptq_solve
from moeq.quant.grid import dequantize
from moeq.quant.rtn import round_to_nearest
from moeq.quant.spec import GridSpec, SolveSpec

# Plans diverge least with 3 or 4 as they are solved, with 1 or 2 once their rounding is learned (benchmarks/LOG.md).
ONE_BIT = 2.0
POOL_TOKENS = 32.0  # average tokens that are added to the gradients of every expert: rare experts have noisy ones


def round_trip(
    weight_EOI: Tensor, grid: GridSpec, scale_dtype: torch.dtype, hessian_EII: Tensor | None, solve: SolveSpec
) -> Tensor:
    """Weights after quantization, float32 [E, O, I]: GPTQ on the Hessians, or rounded to nearest where they are None.

    Raises:
        ValueError: The group size does not divide the in features.
    """
    if hessian_EII is None:
        solution = round_to_nearest(weight_EOI, grid, scale_dtype)
    else:
        # The energy only normalises an error that is not used.
        energy_E = torch.ones(len(weight_EOI), dtype=torch.float64, device=weight_EOI.device)
        solution = gptq_solve(weight_EOI, hessian_EII, grid, solve, scale_dtype, energy_E)
    parts = solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG
    return dequantize(*parts, grid.bits, solution.super_scales, grid.table)


def row_energies(weight_EOI: Tensor, hessian_EII: Tensor) -> Tensor:
    """``(W H W^T)_oo``, the mean squared output of each row, float64 [E, O]; one expert at a time."""
    pairs = zip(weight_EOI.float(), hessian_EII.float(), strict=True)
    rows = [((weight_OI @ hessian_II) * weight_OI).sum(1, dtype=torch.float64) for weight_OI, hessian_II in pairs]
    return torch.stack(rows).clamp_min(0.0)


def token_hessians(sum_EII: Tensor, num_tokens_E: Tensor, num_all_tokens: float) -> Tensor:
    """``n/N H``: the sum over an expert's tokens over the number of all tokens, float32 [E, I, I].

    An expert that no token reached counts as reached by one average token of its layer: quantizing it is not free.

    Args:
        sum_EII: Sum of x x^T over the tokens of each expert.
        num_tokens_E: n.
        num_all_tokens: N.
    """
    pool_II = sum_EII.sum(0) / num_tokens_E.sum().clamp_min(1.0)
    unseen_E11 = (num_tokens_E == 0).view(-1, 1, 1)
    return (torch.where(unseen_E11, pool_II, sum_EII) / num_all_tokens).float()


def mean_square_gradients(sum_EO: Tensor, num_tokens_E: Tensor) -> Tensor:
    """G: mean squared gradient of each output, float64 [E, O], rare experts pulled toward the mean of their layer.

    Args:
        sum_EO: Sum over the tokens of each expert of the squared gradient.
        num_tokens_E: How many tokens these are.
    """
    pool = sum_EO.sum() / (num_tokens_E.sum().clamp_min(1.0) * sum_EO.shape[1])
    return (sum_EO + POOL_TOKENS * pool) / (num_tokens_E + POOL_TOKENS).unsqueeze(1)


def fisher_costs(row_energy_EO: Tensor, gradient_EO: Tensor, rows: slice, bits: int) -> Tensor:
    """Nats per token for some rows (one linear of a stack), float64 [E].

    Args:
        row_energy_EO: ``row_energies`` of the error, with ``token_hessians``.
        gradient_EO: G.
        rows: Rows of the linear.
        bits: Of the codes.
    """
    return (0.5 if bits > 1 else 0.5 * ONE_BIT) * (gradient_EO[:, rows] * row_energy_EO[:, rows]).sum(1)


def hessian_costs(row_energy_EO: Tensor, output_energy_EO: Tensor, rows: slice) -> Tensor:
    """Share of the layer's output energy that becomes noise, float64 [E]; 0 for a layer without output."""
    total = output_energy_EO[:, rows].sum()
    return row_energy_EO[:, rows].sum(1) / total.clamp_min(torch.finfo(torch.float64).tiny)


def pmq_costs(
    share_E: Tensor, affinity_E: Tensor, error_E: Tensor, alpha: float = 1.0, beta: float = 1.5, gamma: float = 2.0
) -> Tensor:
    """PMQ with the exponents of the paper's text (its code raises the error to alpha, not gamma), float64 [E].

    Args:
        share_E: Share of the tokens that each expert sees.
        affinity_E: Summed routing weight of each expert over the number of all tokens.
        error_E: Root of the mean squared change of the block's output when the expert alone is quantized.
        alpha: Exponent of the share.
        beta: Exponent of the routing weight.
        gamma: Exponent of the error.
    """
    return share_E.double() ** alpha * affinity_E.double() ** beta * error_E.double() ** gamma
