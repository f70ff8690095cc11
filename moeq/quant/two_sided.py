"""Rounding under a Kronecker-factored curvature of the end loss: an error is paid for by where it goes, too.

    loss(D) = 1/2 tr(H_O D H_I D^T),   D = dequantized W - W,   H_I = mean of x x^T,   H_O = mean of g g^T

with x the inputs of the linear and g the gradients of the log-likelihood at its outputs (``moeq.survey.fisher`` draws
them).  GPTQ is H_O = 1: each row for itself.  With H_O the errors of the rows are chosen so that they cancel in what
the rest of the model makes of them (YAQA: Tseng et al., 2025, arXiv 2505.22988).

Rounding.  H = L^T diag(d) L with L unit lower triangular for both sides, so

    loss = 1/2 sum_rc d_r d'_c (A D B^T)_rc^2,     (A D B^T)_rc = D_rc + feedback of the (r' <= r, c' <= c) before it

and each weight is rounded from its target minus the feedback.  What (r, c) needs has a smaller r + c, so weights are
rounded in square tiles, all tiles on a diagonal together: feedback from outside a tile is two matrix products, and in
it all weights on a diagonal go together.

``moeq.quant.descent`` goes on from there.

Shapes: E experts, O out features, I in features, N tiles, S their side; S is given twice, rows and columns.  Scales and
zero points are those of each weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SIDE = 16  # of a tile: its 31 steps are small tensors, what lies between tiles large products


@dataclass(frozen=True)
class Levels:
    """The grid of every weight: real = (code - zero_point) * scale, codes 0 to top.

    Attributes:
        scale_EOI: float32, not zero.
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
    code_EOI = _round(_visited(weight_EOI, row_EO, column_EI), left_EOO, right_EII, levels.visited(row_EO, column_EI))
    return _visited(code_EOI, row_EO.argsort(-1), column_EI.argsort(-1))


def unit_lower(hessian_EII: Tensor) -> Tensor:
    """L of ``H = L^T diag(d) L``, unit lower triangular."""
    upper_EII = torch.linalg.cholesky(hessian_EII.flip(1, 2)).flip(1, 2)
    return (upper_EII / upper_EII.diagonal(dim1=1, dim2=2).unsqueeze(1)).mT.contiguous()


def _round(weight_EOI: Tensor, left_EOO: Tensor, right_EII: Tensor, levels: Levels) -> Tensor:
    """Codes of weights in the order in which they are visited; diagonals of tiles, one after another."""
    num_experts, num_rows, num_columns = weight_EOI.shape
    weight, scale, zero = (
        _tiles(value, fill)
        for value, fill in ((weight_EOI, 0.0), (levels.scale_EOI, 1.0), (levels.zero_point_EOI, 0.0))
    )
    left, right = (_padded_unit(factor).unflatten(1, (-1, SIDE)) for factor in (left_EOO, right_EII))
    left_ss, right_ss = _within_tiles(left), _within_tiles(right)
    code = torch.empty_like(weight)
    # Zero where nothing is rounded yet, so that whole rows of factors may be multiplied: A D, and D.
    mixed = weight.new_zeros(num_experts, left.shape[1], SIDE, right.shape[3])
    delta = weight.new_zeros(num_experts, right.shape[1], left.shape[3], SIDE)
    for step in range(left.shape[1] + right.shape[1] - 1):
        i = torch.arange(max(0, step - right.shape[1] + 1), min(left.shape[1], step + 1), device=weight.device)
        j = step - i
        before, above = mixed[:, i] @ right[:, j].mT, left[:, i] @ delta[:, j]
        state = weight[:, i, j], scale[:, i, j], zero[:, i, j], before, above, left_ss[:, i], right_ss[:, j]
        made = _round_tiles(levels.top, *(value.flatten(0, 1) for value in state))
        code[:, i, j], delta_tiles, mixed_tiles = (value.unflatten(0, (num_experts, -1)) for value in made)
        delta.unflatten(2, (-1, SIDE))[:, j, i] = delta_tiles
        mixed.unflatten(3, (-1, SIDE)).transpose(2, 3)[:, i, j] = mixed_tiles
    return code.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :num_rows, :num_columns].contiguous()


def _round_tiles(
    top: int, weight_NSS: Tensor, scale_NSS: Tensor, zero_NSS: Tensor, before_NSS: Tensor, above_NSS: Tensor,
    left_NSS: Tensor, right_NSS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, D and A D of tiles, given what comes from the columns before them and from the rows above.

    What is on a diagonal from the lower left to the upper right is independent; with columns in reverse it is on one
    that ``diagonal`` gives as a view.
    """
    weight_NSS, scale_NSS, zero_NSS = (value.flip(2) for value in (weight_NSS, scale_NSS, zero_NSS))
    above_NSS, target_NSS = above_NSS.flip(2), weight_NSS - before_NSS.flip(2)
    right_NSS = right_NSS.mT.flip(1, 2)  # from a column, to a column
    code_NSS, delta_NSS, mixed_NSS = (torch.empty_like(weight_NSS) for _ in range(3))
    for step in range(2 * SIDE - 1):
        rows = slice(max(0, step - SIDE + 1), min(SIDE, step + 1))
        columns = slice(SIDE - 1 - step + rows.start, SIDE - 1 - step + rows.stop)

        def here(value_NSS: Tensor, rows: slice = rows, columns: slice = columns) -> Tensor:
            return value_NSS[:, rows, columns].diagonal(dim1=1, dim2=2)

        above_NR, scale_NR, zero_NR = here(above_NSS), here(scale_NSS), here(zero_NSS)
        code_NR = ((here(target_NSS) - above_NR) / scale_NR).add_(zero_NR).round_().clamp_(0, top)
        delta_NR = (code_NR - zero_NR).mul_(scale_NR).sub_(here(weight_NSS))
        mixed_NR = delta_NR + above_NR
        for kept_NSS, value_NR in ((code_NSS, code_NR), (delta_NSS, delta_NR), (mixed_NSS, mixed_NR)):
            here(kept_NSS).copy_(value_NR)
        above_NSS[:, :, columns].addcmul_(left_NSS[:, :, rows], delta_NR.unsqueeze(1))
        target_NSS[:, rows].addcmul_(right_NSS[:, columns], mixed_NR.unsqueeze(2), value=-1.0)
    return code_NSS.flip(2), delta_NSS.flip(2), mixed_NSS.flip(2)


def _tiles(value_EOI: Tensor, fill: float) -> Tensor:
    """A matrix in tiles [E, rows of tiles, columns of tiles, S, S]."""
    _, num_rows, num_columns = value_EOI.shape
    padded = pad(value_EOI, (0, -num_columns % SIDE, 0, -num_rows % SIDE), value=fill)
    return padded.unflatten(1, (-1, SIDE)).unflatten(3, (-1, SIDE)).transpose(2, 3).contiguous()


def _padded_unit(factor_EII: Tensor) -> Tensor:
    """A unit triangular factor of more features, which neither give nor take feedback."""
    size = factor_EII.shape[1]
    padded = pad(factor_EII, (0, -size % SIDE, 0, -size % SIDE))
    padded.diagonal(dim1=1, dim2=2)[:, size:] = 1.0
    return padded


def _within_tiles(factor: Tensor) -> Tensor:
    """Tiles on the diagonal of a factor [E, tiles, S, I]."""
    return factor.unflatten(3, (-1, SIDE)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def _visited(value_EOI: Tensor, row_EO: Tensor, column_EI: Tensor) -> Tensor:
    expert_E11 = torch.arange(len(value_EOI), device=value_EOI.device)[:, None, None]
    return value_EOI[expert_E11, row_EO[:, :, None], column_EI[:, None]]
