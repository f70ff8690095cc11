"""Solution of a solver, and the error by which solvers are compared.

    relative error of an expert = tr(dW H dW^T) / tr(W H W^T),   dW = W - dequantized W

that is, the share of the output's energy (mean squared output over the calibration tokens) that the quantization turned
into noise.  With the identity for H it is the plain squared error of the weight.

Shapes: E experts, O out features, I in features, G groups per row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.quant.spec import GridSpec, QuantizedWeight, SuperScales
from moeq.quant.together import taken_together

LARGE_PRODUCT = 1 << 28  # multiplications
_COLUMNS = 256  # columns of the Hessian per matrix product


@dataclass(frozen=True)
class Solution:
    """Quantized weights of a stack of experts, and how the solve went.

    Attributes:
        codes_EOI: uint8, each in [0, 2^bits).
        scale_EOG: Scales in their storage dtype.
        zero_point_EOG: uint8, or None for a symmetric grid.
        relative_error_E: float64; tr(dW H dW^T) / tr(W H W^T), 0 where the expert has no output.
        num_retries_E: int64; factorisations of the Hessian that failed before one succeeded.
        failed_E: bool; no factorisation succeeded and the expert was rounded to nearest.
        super_scales: Of a two-level grid, on which scales and zero points are integers; else None.
        one_sided_E: bool; a Kronecker factor could not be factorised, so that the codes are those of one Hessian.  None
            where no factor was asked for.
    """

    codes_EOI: Tensor
    scale_EOG: Tensor
    zero_point_EOG: Tensor | None
    relative_error_E: Tensor
    num_retries_E: Tensor
    failed_E: Tensor
    super_scales: SuperScales | None = None
    one_sided_E: Tensor | None = None

    def on_cpu(self) -> "Solution":
        """The same on the CPU: one copy of each tensor, whatever the number of experts."""
        supers = self.super_scales
        tensors = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, super_scales=None if supers is None else supers.each(Tensor.cpu))

    def expert(self, expert_idx: int, grid: GridSpec, rows: slice = slice(None)) -> QuantizedWeight:
        """One expert, or some of its rows (the gate or the up part of a stacked weight), as a quantized weight."""
        zero_point_EOG, supers = self.zero_point_EOG, self.super_scales
        return QuantizedWeight(
            codes_OI=self.codes_EOI[expert_idx, rows],
            scale_OG=self.scale_EOG[expert_idx, rows],
            zero_point_OG=None if zero_point_EOG is None else zero_point_EOG[expert_idx, rows],
            bits=grid.bits,
            group_size=grid.group_size,
            super_scales=None if supers is None else supers.each(lambda tensor: tensor[expert_idx, rows]),
            table=None if grid.table is None else grid.stored_kind,
        )


def output_energy(weight_OI: Tensor, hessian_II: Tensor, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """``tr(W H W^T)`` for a symmetric H, as a float64 scalar; O * I^2 operations, half of the full product.

    With G = W^T W it is the sum of H * G.  Only the blocks on and below the diagonal are used: those above contribute
    the same amount again.

    Args:
        weight_OI: float32.
        hessian_II: float32.
        product_dtype: Of the matrix products; with bfloat16 a large weight keeps four digits, at a third of the time.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight_OI.device)
    factor_OI = weight_OI.to(product_dtype)
    for start in range(0, weight_OI.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight_OI.shape[1])
        gram_II = (factor_OI[:, start:stop].mT @ factor_OI[:, :stop]).float().mul_(hessian_II[start:stop, :stop])
        total += 2.0 * gram_II[:, :start].sum(dtype=torch.float64) + gram_II[:, start:].sum(dtype=torch.float64)
    return total


def output_energies(weight_EOI: Tensor, hessian_EII: Tensor) -> Tensor:
    """``output_energy`` of each expert of a stack, float64 [E].

    On a CPU the products of large weights are in bfloat16: the last digits of a normaliser of reported errors are not
    worth a third of the time of a solve.  Elsewhere they are one product in float32 for the whole stack.
    """
    if taken_together(weight_EOI.device):
        weight_EOI = weight_EOI.float()
        return torch.bmm(weight_EOI, hessian_EII.float()).mul_(weight_EOI).sum((1, 2), dtype=torch.float64)
    large = weight_EOI.shape[1] * weight_EOI.shape[2] ** 2 > LARGE_PRODUCT
    pairs = zip(weight_EOI.float(), hessian_EII.float(), strict=True)
    return torch.stack([output_energy(*pair, torch.bfloat16 if large else torch.float32) for pair in pairs])


def relative_error(error_E: Tensor, energy_E: Tensor) -> Tensor:
    """``error / energy``, not below 0 (rounding), and 0 where there is neither."""
    return torch.where(energy_E > 0, error_E.clamp_min(0.0) / energy_E.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
