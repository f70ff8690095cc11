"""Rounding under a Kronecker-factored curvature of the end loss: an error is paid for by where it goes, too.

    loss(D) = 1/2 tr(H_O D H_I D^T),   D = dequantized W - W,   H_I = mean of x x^T,   H_O = mean of g g^T

with x the inputs of the linear and g the gradients of the log-likelihood at its outputs (``moeq.survey.fisher`` draws
them).  GPTQ is H_O = 1: each row for itself.  With H_O the errors of the rows are chosen so that they cancel in what
the rest of the model makes of them (YAQA: Tseng et al., 2025, arXiv 2505.22988).

Rounding.  H = L^T diag(d) L with L unit lower triangular for both sides, so

    loss = 1/2 sum_rc d_r d'_c (A D B^T)_rc^2,     (A D B^T)_rc = D_rc + feedback of the (r' <= r, c' <= c) before it

and each weight is rounded from its target minus the feedback.  All (r, c) with the same r + c depend only on earlier
ones and go together: O + I - 1 steps.

Descent.  A weight moves to the level that minimises the loss with all others fixed, column by column, in a column row
by row; rows that stay where they are cost nothing, since all of a column are looked at together until one moves.

No callback uses these yet; what a trial of them found is in benchmarks/LOG.md.

Shapes: E experts, O out features, I in features, N weights of a step.  Scales and zero points are those of each weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """The grid of every weight: real = (code - zero_point) * scale, codes 0 to top.

    Attributes:
        scale_EOI: float32, positive.
        zero_point_EOI: float32.
        top: The largest code.
    """

    scale_EOI: Tensor
    zero_point_EOI: Tensor
    top: int

    def nearest(self, weight_EOI: Tensor) -> Tensor:
        """Codes of the nearest levels, float32."""
        return (weight_EOI / self.scale_EOI + self.zero_point_EOI).round_().clamp_(0, self.top)

    def real(self, code_EOI: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return (code_EOI - self.zero_point_EOI) * self.scale_EOI

    def visited(self, row_EO: Tensor, column_EI: Tensor) -> "Levels":
        """The same in another order of rows and columns."""
        scale_EOI, zero_point_EOI = (
            _visited(value, row_EO, column_EI) for value in (self.scale_EOI, self.zero_point_EOI)
        )
        return Levels(scale_EOI, zero_point_EOI, self.top)


def damped(hessian_EII: Tensor, damping: float) -> Tensor:
    """A factor with ``damping`` times its mean diagonal added to the diagonal, mean diagonal one; zero becomes 1.

    The loss is only ever compared with itself, so its unit does not matter.
    """
    size = hessian_EII.shape[-1]
    mean_E11 = hessian_EII.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    eye_II = torch.eye(size, device=hessian_EII.device)
    scaled_EII = torch.where(mean_E11 > 0, hessian_EII / mean_E11.clamp_min(torch.finfo(torch.float32).tiny), eye_II)
    return (scaled_EII + damping * eye_II) / (1 + damping)


def two_sided_loss(delta_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor) -> Tensor:
    """``1/2 tr(H_O D H_I D^T)`` of each expert, [E]."""
    return 0.5 * (output_EOO @ delta_EOI @ input_EII * delta_EOI).sum((1, 2))


@torch.no_grad()
def two_sided_round(weight_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor, levels: Levels) -> Tensor:
    """Codes by rounding with feedback over rows and columns, large curvatures first; float32 [E, O, I].

    Args:
        weight_EOI: What is rounded, float32.
        output_EOO: H_O, positive definite (``damped``).
        input_EII: H_I, positive definite.
        levels: The grid.

    Raises:
        torch.linalg.LinAlgError: A factor is not positive definite.
    """
    row_EO, column_EI = (
        hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
        for hessian in (output_EOO, input_EII)
    )
    left_EOO = unit_lower(_visited(output_EOO, row_EO, row_EO))
    right_EII = unit_lower(_visited(input_EII, column_EI, column_EI))
    code_EOI = _wavefront(
        _visited(weight_EOI, row_EO, column_EI), left_EOO, right_EII, levels.visited(row_EO, column_EI)
    )
    return _visited(code_EOI, row_EO.argsort(-1), column_EI.argsort(-1))


def unit_lower(hessian_EII: Tensor) -> Tensor:
    """L of ``H = L^T diag(d) L``, unit lower triangular."""
    upper_EII = torch.linalg.cholesky(hessian_EII.flip(1, 2)).flip(1, 2)
    return (upper_EII / upper_EII.diagonal(dim1=1, dim2=2).unsqueeze(1)).mT.contiguous()


def _wavefront(weight_EOI: Tensor, left_EOO: Tensor, right_EII: Tensor, levels: Levels) -> Tensor:
    _, num_rows, num_columns = weight_EOI.shape
    code_EOI, mixed_EOI = torch.empty_like(weight_EOI), torch.zeros_like(weight_EOI)  # mixed = A D
    delta_EIO = torch.zeros_like(weight_EOI.mT).contiguous()
    for step in range(num_rows + num_columns - 1):
        row_N = torch.arange(max(0, step - num_columns + 1), min(num_rows, step + 1), device=weight_EOI.device)
        column_N = step - row_N
        here = (slice(None), row_N, column_N)
        # What is not rounded yet is zero in mixed and delta, so whole rows may be multiplied.
        above_EN = (left_EOO[:, row_N] * delta_EIO[:, column_N]).sum(-1)
        before_EN = (mixed_EOI[:, row_N] * right_EII[:, column_N]).sum(-1)
        target_EN = weight_EOI[here] - above_EN - before_EN
        of_step = Levels(levels.scale_EOI[here], levels.zero_point_EOI[here], levels.top)
        code_EOI[here] = code_EN = of_step.nearest(target_EN)
        delta_EN = of_step.real(code_EN) - weight_EOI[here]
        delta_EIO[:, column_N, row_N] = delta_EN
        mixed_EOI[here] = delta_EN + above_EN
    return code_EOI


@torch.no_grad()
def descend(
    code_EOI: Tensor, weight_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor, levels: Levels, num_sweeps: int
) -> Tensor:
    """Codes after sweeps of coordinate descent: the loss never rises; a sweep without a move is the last.

    Args:
        code_EOI: Where to start, float32; any solver's.
        weight_EOI: The original weights, float32.
        output_EOO: H_O with a positive diagonal.
        input_EII: H_I with a positive diagonal.
        levels: The grid.
        num_sweeps: At most.
    """
    code_EOI = code_EOI.clone()
    for _ in range(num_sweeps):
        # Once per sweep from nothing, so that rounding errors of the updates do not add up.
        slope_EOI = output_EOO @ (levels.real(code_EOI) - weight_EOI) @ input_EII
        moves = [
            _descend_column(column, code_EOI, slope_EOI, output_EOO, input_EII, levels)
            for column in range(code_EOI.shape[2])
        ]
        if not any(moves):
            break
    return code_EOI


def _descend_column(
    column: int, code_EOI: Tensor, slope_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor, levels: Levels
) -> bool:
    """One column, in place; whether anything moved."""
    code_EO, scale_EO = code_EOI[:, :, column], levels.scale_EOI[:, :, column]
    slope_EO, curvature_E1 = slope_EOI[:, :, column].clone(), input_EII[:, column, column, None]
    diagonal_EO = output_EOO.diagonal(dim1=1, dim2=2) * curvature_E1 * scale_EO
    row_O, expert_E = (torch.arange(size, device=code_EO.device) for size in (code_EO.shape[1], len(code_EO)))
    delta_EO, next_E1 = torch.zeros_like(slope_EO), torch.zeros(len(code_EO), 1, device=row_O.device)
    while True:
        best_EO = (code_EO - slope_EO / diagonal_EO).round_().clamp_(0, levels.top)
        wants_EO = (best_EO != code_EO) & (row_O >= next_E1)
        if not wants_EO.any():
            break
        first_E = wants_EO.int().argmax(-1)  # the first row that moves; 0 where none does
        moves_E = wants_EO[expert_E, first_E]
        at = (expert_E[moves_E], first_E[moves_E])
        moved_M = (best_EO[at] - code_EO[at]) * scale_EO[at]
        code_EO[at], delta_EO[at] = best_EO[at], moved_M
        slope_EO[at[0]] += output_EOO[at[0], at[1]] * (moved_M.unsqueeze(-1) * curvature_E1[at[0]])
        next_E1[at[0], 0] = (at[1] + 1).to(next_E1.dtype)
        next_E1[~moves_E] = code_EO.shape[1]
    if moved := bool(delta_EO.any()):
        slope_EOI += (output_EOO @ delta_EO.unsqueeze(-1)) * input_EII[:, column, None]
    return moved


def _visited(value_EOI: Tensor, row_EO: Tensor, column_EI: Tensor) -> Tensor:
    expert_E11 = torch.arange(len(value_EOI), device=value_EOI.device)[:, None, None]
    return value_EOI[expert_E11, row_EO[:, :, None], column_EI[:, None]]
