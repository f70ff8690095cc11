"""A solution's codes once more, under two Hessians: rounding with feedback over rows and columns, then descent.

Scales and zero points are those of the solution, as they are stored; its codes are what is replaced.

Shapes: E experts, O out features, I in features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.quant.descent import descend
from moeq.quant.grid import QParams, lowest_level, real_values
from moeq.quant.solution import Solution, output_energies, output_energy, relative_error
from moeq.quant.spec import GridSpec
from moeq.quant.two_sided import Levels, damped, two_sided_round


@dataclass(frozen=True)
class TwoSidedSpec:
    """How codes are found under two Hessians.

    Attributes:
        damping: Fraction of the mean diagonal added to the diagonals of both.
        num_sweeps: Of the descent, at most.
    """

    damping: float = 0.1
    num_sweeps: int = 8

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < float("inf"):
            raise ValueError(f"damping ({self.damping}) must be positive and finite; the usual value is 0.1")
        if self.num_sweeps < 0:
            raise ValueError(f"num_sweeps ({self.num_sweeps}) must not be negative; the usual value is 8")


@torch.no_grad()
def two_sided_solution(
    solution: Solution,
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    output_EOO: Tensor,
    input_EII: Tensor,
    grid: GridSpec,
    spec: TwoSidedSpec,
) -> Solution:
    """The solution with other codes; those of an expert with a factor that is not positive definite stay.

    Args:
        solution: On a grid of one level of scales, evenly spaced.
        weight_EOI: What was solved, float32.
        hessian_EII: Of what the relative error is said, as in the solution.
        output_EOO: H_O in any positive scale, float32.
        input_EII: H_I likewise.
        grid: The grid.
        spec: Damping, sweeps.
    """
    output_EOO, input_EII = damped(output_EOO, spec.damping), damped(input_EII, spec.damping)
    failed_E = _indefinite(output_EOO) | _indefinite(input_EII)
    for factor in (output_EOO, input_EII):
        factor[failed_E] = torch.eye(factor.shape[1], device=factor.device)
    qparams = QParams(solution.scale_EOG, solution.zero_point_EOG)
    levels = _levels(qparams, grid, weight_EOI.shape[2])
    code_EOI = two_sided_round(weight_EOI, output_EOO, input_EII, levels)
    code_EOI = descend(code_EOI, weight_EOI, output_EOO, input_EII, levels, spec.num_sweeps)
    codes_EOI = code_EOI.to(torch.uint8)
    codes_EOI[failed_E] = solution.codes_EOI[failed_E]
    delta_EOI = weight_EOI - real_values(codes_EOI, qparams, grid)
    error_E = torch.stack([output_energy(*pair) for pair in zip(delta_EOI, hessian_EII.float(), strict=True)])
    error_E = relative_error(error_E, output_energies(weight_EOI, hessian_EII))
    return replace(solution, codes_EOI=codes_EOI, relative_error_E=error_E, one_sided_E=failed_E)


def _indefinite(hessian_EII: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(hessian_EII.flip(1, 2)).info != 0


def _levels(qparams: QParams, grid: GridSpec, in_features: int) -> Levels:
    """Scale and zero point of every weight."""
    scale_EOG, zero_point_EOG = qparams.divisors(), -lowest_level(qparams, grid)
    size = in_features // scale_EOG.shape[2]
    scale_EOI, zero_point_EOI = (value.repeat_interleave(size, dim=2) for value in (scale_EOG, zero_point_EOG))
    return Levels(scale_EOI, zero_point_EOI, 2**grid.bits - 1)
