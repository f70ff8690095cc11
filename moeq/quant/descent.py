"""Coordinate descent of a two-sided loss over the codes of weights (``moeq.quant.two_sided``).

    loss(D) = 1/2 tr(H_O D H_I D^T)

With all other weights fixed, the best level of one is known from the slope H_O D H_I.  Columns are visited one after
another, as only the diagonal of H_I counts within one.  In a column every row that would gain by itself wants to move.
Moved together they may overshoot; so all wishes, the quarter and the sixteenth that gain most, and the best alone,
which always lowers the loss, are tried in one product, and those are moved that together lower it most.  The others
have their turn in the next sweep.

Slopes of a block of columns are kept up to date move by move, the others once per block.

Shapes: E experts, O out features, I in features, C columns of a block, J tried numbers of moves.
"""

import torch
from torch import Tensor

from moeq.quant.two_sided import Levels

BLOCK = 32
HALVINGS = (0, 2, 4)  # of the number of wishes: what is tried beside the best alone
# What a move must gain, in curvatures of a level: less is rounding of the slope.
LEAST_GAIN = 1e-6


@torch.no_grad()
def descend(
    code_EOI: Tensor, weight_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor, levels: Levels, num_sweeps: int
) -> Tensor:
    """Codes after sweeps of descent: the loss never rises; a sweep without a move is the last.

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
        moved = False
        for start in range(0, code_EOI.shape[2], BLOCK):
            part = slice(start, min(start + BLOCK, code_EOI.shape[2]))
            pushed_EOC = _descend_block(part, code_EOI, slope_EOI, output_EOO, input_EII, levels)
            if pushed_EOC is not None:
                slope_EOI += pushed_EOC @ input_EII[:, part]
                moved = True
        if not moved:
            break
    return code_EOI


def _descend_block(
    part: slice, code_EOI: Tensor, slope_EOI: Tensor, output_EOO: Tensor, input_EII: Tensor, levels: Levels
) -> Tensor | None:
    """Some columns, whose codes are changed in place; H_O times the change of their weights, None without any."""
    code_CEO, slope_CEO, scale_CEO = (
        value[:, :, part].permute(2, 0, 1).contiguous() for value in (code_EOI, slope_EOI, levels.scale_EOI)
    )
    input_ECC, diagonal_EO = input_EII[:, part, part], output_EOO.diagonal(dim1=1, dim2=2)
    pushed_CEO, moved = torch.zeros_like(slope_CEO), False
    for column, (code_EO, scale_EO) in enumerate(zip(code_CEO, scale_CEO, strict=True)):
        among_CE1 = input_ECC[:, column].mT.unsqueeze(2)
        curvature_E1 = among_CE1[column]
        curvature_EO = diagonal_EO * curvature_E1
        slope_EO = slope_CEO[column]
        best_EO = (code_EO - slope_EO / (curvature_EO * scale_EO)).round_().clamp_(0, levels.top)
        move_EO = (best_EO - code_EO).mul_(scale_EO)
        gain_EO = move_EO * (slope_EO + 0.5 * curvature_EO * move_EO)
        gain_EO = gain_EO.where(gain_EO < -LEAST_GAIN * curvature_EO * scale_EO.square(), 0.0)
        if not gain_EO.any():
            continue
        kept_EO, push_EO = _best_moves(gain_EO, move_EO, slope_EO, curvature_E1, output_EOO)
        code_EO.copy_(best_EO.where(kept_EO, code_EO))
        pushed_CEO[column] = push_EO
        slope_CEO += push_EO * among_CE1
        moved = True
    if not moved:
        return None
    code_EOI[:, :, part] = code_CEO.permute(1, 2, 0)
    return pushed_CEO.permute(1, 2, 0)


def _best_moves(
    gain_EO: Tensor, move_EO: Tensor, slope_EO: Tensor, curvature_E1: Tensor, output_EOO: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the moves of a column to make, and H_O times them; an expert without a gain makes none."""
    wants_EO = gain_EO < 0
    rank_EO = gain_EO.argsort(dim=1, stable=True).argsort(dim=1)
    halvings_J = torch.tensor((*HALVINGS, 62), device=gain_EO.device)
    number_EJ = (wants_EO.sum(1, keepdim=True) >> halvings_J).clamp_(min=1)
    kept_EOJ = (rank_EO.unsqueeze(2) < number_EJ.unsqueeze(1)) & wants_EO.unsqueeze(2)
    move_EOJ = move_EO.unsqueeze(2) * kept_EOJ
    push_EOJ = output_EOO @ move_EOJ
    change_EJ = (move_EOJ * (slope_EO.unsqueeze(2) + 0.5 * curvature_E1.unsqueeze(2) * push_EOJ)).sum(1)
    best_E11 = change_EJ.argmin(1)[:, None, None].expand(-1, gain_EO.shape[1], 1)
    return kept_EOJ.gather(2, best_E11).squeeze(2), push_EOJ.gather(2, best_E11).squeeze(2)
