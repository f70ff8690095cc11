"""What the papers' published code does for one linear, line for line: the yardstick of ``solve.py``.

GPTQ's code, which AutoGPTQ and MoEQuant took over: a Hessian per linear (gate and up have one each, of one input),
three factorisations (cholesky, cholesky_inverse, upper cholesky), then one column at a time with lazy updates.

Shapes: O out features, I in features, B columns of a block, T tokens.
"""

import torch
from torch import Tensor

from moeq.quant.grid import choose_qparams
from moeq.quant.spec import GridSpec, SolveSpec


def papers_hessian(batches: list[Tensor]) -> Tensor:
    """The running mean of 2 x x^T over batches [T, I]."""
    hessian_II = torch.zeros(batches[0].shape[1], batches[0].shape[1], device=batches[0].device)
    seen = 0
    for x_TI in batches:
        hessian_II *= seen / (seen + len(x_TI))
        seen += len(x_TI)
        scaled_IT = (2 / seen) ** 0.5 * x_TI.mT.float()
        hessian_II += scaled_IT.matmul(scaled_IT.mT)
    return hessian_II


def papers_solve(weight_OI: Tensor, hessian_II: Tensor, grid: GridSpec, solve: SolveSpec) -> Tensor:
    """The dequantized weight by GPTQ's published loop (also MoEQuant's and AutoGPTQ's), line for line."""
    weight_OI, inverse_II = weight_OI.clone(), hessian_II.clone()
    scale_O1 = choose_qparams(weight_OI.unsqueeze(0), grid, torch.float32).scale_EOG[0]
    middle, top = 2 ** (grid.bits - 1), 2**grid.bits - 1
    columns, width = weight_OI.shape[1], solve.column_block
    losses_OI, rounded_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    diagonal = torch.arange(columns, device=weight_OI.device)
    inverse_II[diagonal, diagonal] += solve.damping * torch.mean(torch.diag(inverse_II))
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(inverse_II))
    inverse_II = torch.linalg.cholesky(inverse_II, upper=True)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block_OB = weight_OI[:, start:stop].clone()
        block_inverse_BB = inverse_II[start:stop, start:stop]
        rounded_OB, error_OB = torch.zeros_like(block_OB), torch.zeros_like(block_OB)
        losses_OB = torch.zeros_like(block_OB)
        for column in range(stop - start):
            weight_O, pivot = block_OB[:, column], block_inverse_BB[column, column]
            code_O1 = torch.clamp(torch.round(weight_O.unsqueeze(1) / scale_O1) + middle, 0, top)
            rounded_O = (scale_O1 * (code_O1 - middle)).flatten()
            rounded_OB[:, column] = rounded_O
            losses_OB[:, column] = (weight_O - rounded_O) ** 2 / pivot**2
            error_O = (weight_O - rounded_O) / pivot
            block_OB[:, column:] -= error_O.unsqueeze(1).matmul(block_inverse_BB[column, column:].unsqueeze(0))
            error_OB[:, column] = error_O
        rounded_OI[:, start:stop] = rounded_OB
        losses_OI[:, start:stop] = losses_OB / 2
        weight_OI[:, stop:] -= error_OB.matmul(inverse_II[start:stop, stop:])
    return rounded_OI
