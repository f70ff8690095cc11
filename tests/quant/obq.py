"""What tests of GPTQ share: problems, their error, and optimal brain quantization in float64, slow and explicit."""

from dataclasses import replace

import torch
from torch import Tensor

from moeq.quant.grid import choose_qparams, dequantize
from moeq.quant.solution import Solution
from moeq.quant.spec import GridSpec, SolveSpec

GRIDS = [GridSpec(3, None, True, False), GridSpec(4, 16, False, True), GridSpec(2, 24, False, False),
         GridSpec(3, 16, True, False, "full_range"), GridSpec(1, 16, True, False)]  # fmt: skip
GRID_NAMES = ["channel", "group16", "group24", "full_range", "one_bit"]
SOLVES = [SolveSpec(0.01, True, 40), SolveSpec(0.01, False, 40)]


def problem(seed: int, experts: int = 1, shape: tuple[int, int] = (10, 96)) -> tuple[Tensor, Tensor]:
    """Weights and Hessians of correlated inputs, both float32."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    mixing_II = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs_ETI = torch.randn(experts, 2 * in_features, in_features, generator=generator) @ mixing_II
    weight_EOI = torch.randn(experts, out_features, in_features, generator=generator) * 0.05
    return weight_EOI, inputs_ETI.mT @ inputs_ETI / (2 * in_features)


def rounded(solution: Solution, bits: int) -> Tensor:
    return dequantize(solution.codes_EOI, solution.scale_EOG, solution.zero_point_EOG, bits)


def output_error(weight_EOI: Tensor, rounded_EOI: Tensor, hessian_EII: Tensor) -> Tensor:
    """tr(dW H dW^T) / tr(W H W^T) in float64."""
    weight, delta, hessian = weight_EOI.double(), (weight_EOI - rounded_EOI).double(), hessian_EII.double()
    return ((delta @ hessian) * delta).sum((1, 2)) / ((weight @ hessian) * weight).sum((1, 2))


def reference_obq(weight_OI: Tensor, hessian_II: Tensor, grid: GridSpec, solve: SolveSpec) -> Tensor:
    """Optimal brain quantization in a fixed order: one column at a time, the inverse Hessian updated explicitly."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    original_OI, size = weight_OI.clone(), len(hessian_II)
    inverse_II = torch.linalg.inv(hessian_II + solve.damping * hessian_II.diagonal().mean() * torch.eye(size).double())
    order = list(range(size))
    if solve.act_order:
        order.sort(key=lambda column: -float(hessian_II[column, column]))
    group_size = grid.group_size or size
    per_group = replace(grid, group_size=None)
    source_OI = original_OI if solve.act_order or grid.group_size is None else weight_OI
    parameters = {}
    result_OI = torch.empty_like(weight_OI)
    for column in order:
        group = column // group_size
        if group not in parameters:
            part_OS = source_OI[:, group * group_size : (group + 1) * group_size]
            qparams = choose_qparams(part_OS.float().unsqueeze(0), per_group, torch.bfloat16)
            zero = qparams.zero_point_EOG
            middle = 0.5 if grid.bits == 1 else 2.0 ** (grid.bits - 1)
            zero_O = torch.tensor(middle) if zero is None else zero[0, :, 0].double()
            parameters[group] = (qparams.scale_EOG[0, :, 0].double(), zero_O)
        scale_O, zero_O = parameters[group]
        code_O = (torch.round(weight_OI[:, column] / scale_O) + zero_O).clamp(0, 2**grid.bits - 1)
        if grid.bits == 1:
            code_O = (weight_OI[:, column] > 0).double()
        result_OI[:, column] = (code_O - zero_O) * scale_O
        error_O = (weight_OI[:, column] - result_OI[:, column]) / inverse_II[column, column]
        weight_OI -= torch.outer(error_O, inverse_II[column])
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
        inverse_II[column, :] = inverse_II[:, column] = 0.0
        inverse_II[column, column] = 1.0  # out of the way: no longer coupled to any column
    return result_OI
