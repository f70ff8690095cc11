"""GPTQ: quantize the columns of a weight one after another, each correcting for the errors of those before it.

Minimises tr(D H D^T), D = W - dequantized W, greedily (Frantar et al., 2022).  With H = R R^T, R upper triangular,

    tr(D H D^T) = sum_j R_jj^2 |D_j + sum_{k<j} D_k F_kj|^2,     F_kj = R_kj / R_jj,

so column j is rounded from the target W_j + sum_{k<j} D_k F_kj.  That is the weight which GPTQ's published code reaches
by updating all columns to the right with rows of the Cholesky factor of the inverse (QuIP, Chee et al., 2023, prove the
two equal).  This form needs no inverse and one factorisation instead of three, and the residuals give the error.

Speed.  Columns are contiguous (W transposed) and swept in two levels: a block of ``column_block`` columns gathers the
feedback of everything before it in one matrix product; inside it, steps of 16 columns stay in cache.  On a CPU the
sweep is bound by memory traffic, so experts go one at a time; on a GPU by launches, so experts advance together.

Groups.  With act-order, columns are visited by decreasing Hessian diagonal and groups are static: those of the original
column order, with parameters from the original weight.  Without it a group's parameters are chosen when its first
column is reached, from the weights as the columns before it have left them.

Dead columns (zero Hessian diagonal: that input was never anything but 0) get the diagonal 1, which decouples them, so
each of their weights is rounded to its nearest level.  The published code zeroes them instead; but a column that was
dead in calibration need not be dead in use, and the same rule wipes out an expert that saw no token.

Shapes: E experts, O out features, I in features (in visiting order inside this file), G groups per row, B columns of a
block, S columns of a group.  Leading dots are a dimension of experts on a GPU and no dimension on a CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeq.quant.factor import Feedback, factorise
from moeq.quant.grid import QParams, choose_qparams, dequantize
from moeq.quant.solution import Solution, output_energy, relative_error
from moeq.quant.spec import GridSpec, SolveSpec

STEP = 16  # columns per inner step: 16 x 3000 float32 fit a core's L2 cache
LARGE_PRODUCT = 1 << 28  # multiplications
GPU_WORKSPACE_BYTES = 8 << 30


def gptq_solve(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    grid: GridSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    energy_E: Tensor | None = None,
    qparams: QParams | None = None,
) -> Solution:
    """Quantize a stack of experts; the result does not depend on which experts are stacked (bit for bit on a CPU).

    Args:
        weight_EOI: Finite weights, any float dtype; linears that share their input are stacked along O.
        hessian_EII: Symmetric, any positive scale; computed with in float32.
        grid: The integer grid.
        solve: Damping, order of the columns, columns per block.
        scale_dtype: Storage dtype of the scales.
        energy_E: ``output_energy`` of each expert where it is known already, as when one weight is solved at several
            widths; else those of large weights are computed in bfloat16, right to about four digits.
        qparams: ``choose_qparams(weight_EOI, grid, scale_dtype)`` where it is known already, as when one weight is
            solved on several Hessians.  Groups that are chosen on the way (without act-order) have none beforehand.

    Raises:
        ValueError: The group size does not divide the in features, the shapes of weight and Hessian disagree, or
            parameters are given for groups that are chosen on the way.
    """
    num_experts, out_features, in_features = weight_EOI.shape
    if hessian_EII.shape != (num_experts, in_features, in_features):
        raise ValueError(
            f"the Hessian's shape {tuple(hessian_EII.shape)} must be {(num_experts, in_features, in_features)} for "
            f"weights of shape {tuple(weight_EOI.shape)}; pass the Hessian of this weight's own input"
        )
    if qparams is not None and grid.group_size is not None and not solve.act_order:
        raise ValueError("qparams are given, but groups without act-order are chosen on the way; leave them out")
    size = 1
    if weight_EOI.device.type != "cpu":
        size = max(1, GPU_WORKSPACE_BYTES // (4 * in_features * (3 * in_features + 6 * out_features)))
    if energy_E is None:
        # The normaliser of a reported error: its last digits are not worth a third of the time of a large solve.
        large = out_features * in_features**2 > LARGE_PRODUCT
        pairs = zip(weight_EOI.float(), hessian_EII.float(), strict=True)
        energies = [output_energy(*pair, torch.bfloat16 if large else torch.float32) for pair in pairs]
        energy_E = torch.stack(energies)
    parts = []
    for start in range(0, num_experts, size):
        part = slice(start, start + size)
        known = None if qparams is None else qparams.experts(part)
        stacks = weight_EOI[part], hessian_EII[part], energy_E[part]
        parts.append(_solve_together(*stacks, grid, solve, scale_dtype, known))
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point_EOG for part in parts if part.zero_point_EOG is not None]
    return Solution(
        codes_EOI=torch.cat([part.codes_EOI for part in parts]),
        scale_EOG=torch.cat([part.scale_EOG for part in parts]),
        zero_point_EOG=torch.cat(zero_points) if zero_points else None,
        relative_error_E=torch.cat([part.relative_error_E for part in parts]),
        num_retries_E=torch.cat([part.num_retries_E for part in parts]),
        failed_E=torch.cat([part.failed_E for part in parts]),
    )


@dataclass(frozen=True)
class _Columns:
    """The grid of every column: real = level * scale, with levels from low to low + 2^bits - 1, code = level - low.

    Attributes:
        scale_IO: float32 with values of the storage dtype.
        low_IO: float32, minus the zero point.
        grid: The integer grid.
        moving: Size of groups that are chosen, and written into the two tensors, as the sweep reaches them; 0 for none.
        scale_dtype: Storage dtype of the scales.
    """

    scale_IO: Tensor
    low_IO: Tensor
    grid: GridSpec
    moving: int
    scale_dtype: torch.dtype


def _solve_together(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    energy_E: Tensor,
    grid: GridSpec,
    solve: SolveSpec,
    scale_dtype: torch.dtype,
    qparams: QParams | None,
) -> Solution:
    """Solve some experts in one sweep."""
    factors = [factorise(hessian_II.float(), solve.damping, solve.act_order) for hessian_II in hessian_EII]
    visited = list(weight_EOI.float())
    if solve.act_order:
        visited = [weight_OI.index_select(1, f.order_I) for weight_OI, f in zip(visited, factors, strict=True)]
    weight_IO = _stack([weight_OI.mT.contiguous() for weight_OI in visited])
    if grid.group_size is None or solve.act_order:
        qparams = choose_qparams(weight_EOI, grid, scale_dtype) if qparams is None else qparams
        columns = _static_columns(qparams, factors, grid)
        codes_EOI, error_E = _sweep(weight_IO, factors, columns, solve.column_block)
    else:
        grid.num_groups(weight_EOI.shape[2])  # raises where the groups do not fit
        columns = _Columns(torch.empty_like(weight_IO), torch.empty_like(weight_IO), grid, grid.group_size, scale_dtype)
        codes_EOI, error_E = _sweep(weight_IO, factors, columns, solve.column_block)
        qparams = _moved_qparams(columns, grid.group_size)
    for expert_idx, factor in enumerate(factors):
        if factor.failed:  # its residuals were not weighed by the Hessian
            one = qparams.experts(slice(expert_idx, expert_idx + 1))
            codes_1OI = codes_EOI[expert_idx : expert_idx + 1]
            rounded_1OI = dequantize(codes_1OI, one.scale_EOG, one.zero_point_EOG, grid.bits)
            delta_OI = weight_EOI[expert_idx].float() - rounded_1OI[0]
            error_E[expert_idx] = output_energy(delta_OI, hessian_EII[expert_idx].float())
    return Solution(
        codes_EOI=codes_EOI,
        scale_EOG=qparams.scale_EOG,
        zero_point_EOG=qparams.zero_point_EOG,
        relative_error_E=relative_error(error_E, energy_E),
        num_retries_E=torch.tensor([factor.num_retries for factor in factors], device=weight_EOI.device),
        failed_E=torch.tensor([factor.failed for factor in factors], device=weight_EOI.device),
    )


def _static_columns(qparams: QParams, factors: Sequence[Feedback], grid: GridSpec) -> _Columns:
    """The grid of each column, visited in any order, from the groups of the original order."""
    low_EOG = _low(qparams, grid)
    if grid.group_size is None:
        shape = (-1, len(factors[0].order_I), -1)
        scales = list(qparams.scale_EOG.float().mT.expand(shape))
        lows = list(low_EOG.mT.expand(shape))
    else:
        groups = [factor.order_I // grid.group_size for factor in factors]
        scales = [scale_OG.float().mT[group_I] for scale_OG, group_I in zip(qparams.scale_EOG, groups, strict=True)]
        lows = [low_OG.mT[group_I] for low_OG, group_I in zip(low_EOG, groups, strict=True)]
    return _Columns(_stack(scales), _stack(lows), grid, 0, qparams.scale_EOG.dtype)


def _low(qparams: QParams, grid: GridSpec) -> Tensor:
    """The lowest level of each group, float32 [E, O, G]."""
    if qparams.zero_point_EOG is None:
        return torch.full_like(qparams.scale_EOG, -(2 ** (grid.bits - 1)), dtype=torch.float32)
    return -qparams.zero_point_EOG.float()


def _moved_qparams(columns: _Columns, group_size: int) -> QParams:
    """Parameters of the groups that were chosen on the way, read off the first column of each."""
    scale_EGO, low_EGO = _unstack(columns.scale_IO)[:, ::group_size], _unstack(columns.low_IO)[:, ::group_size]
    scale_EOG = scale_EGO.mT.to(columns.scale_dtype).contiguous()
    return QParams(scale_EOG, None if columns.grid.symmetric else (-low_EGO).mT.to(torch.uint8).contiguous())


def _sweep(
    weight_IO: Tensor, factors: Sequence[Feedback], columns: _Columns, column_block: int
) -> tuple[Tensor, Tensor]:
    """Visit all columns; returns codes_EOI, in the original order of columns, and tr(D H D^T) of each expert."""
    feedback_II = _stack([factor.feedback_II for factor in factors])
    gain_I = _stack([factor.gain_I for factor in factors])
    shift_I = _stack([factor.shift_I for factor in factors])
    delta_IO, codes_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO, dtype=torch.uint8)
    error = torch.zeros(weight_IO.shape[:-2], dtype=torch.float64, device=weight_IO.device)
    if columns.moving:  # blocks hold whole groups
        column_block = columns.moving * max(1, column_block // columns.moving)
    for start in range(0, weight_IO.shape[-2], column_block):
        block = slice(start, start + column_block)
        target_BO = weight_IO[..., block, :].clone()
        if start:
            _add_product_(target_BO, feedback_II[..., block, :start], delta_IO[..., :start, :])
        scale_BO, low_BO, delta_BO = (part[..., block, :] for part in (columns.scale_IO, columns.low_IO, delta_IO))
        parts = (target_BO, weight_IO[..., block, :], delta_BO, scale_BO, low_BO)
        level_BO = _round_block(*parts, feedback_II[..., block, block], columns)
        codes_IO[..., block, :] = (level_BO - low_BO).to(torch.uint8)
        # target - rounded is the residual; the damping's share of the error is taken out again.
        residual_BO = target_BO.addcmul_(level_BO, scale_BO, value=-1)
        square_B = (torch.linalg.vector_norm(residual_BO, dim=-1) * gain_I[..., block]).square()
        damped_B = torch.linalg.vector_norm(delta_BO, dim=-1).square() * shift_I[..., block]
        error += (square_B - damped_B).sum(-1, dtype=torch.float64)
    codes = [
        visited_IO.index_select(0, torch.argsort(factor.order_I)).mT.contiguous()
        for visited_IO, factor in zip(_unstack(codes_IO), factors, strict=True)
    ]
    return torch.stack(codes), error.reshape(-1)


def _round_block(
    target_BO: Tensor,
    weight_BO: Tensor,
    delta_BO: Tensor,
    scale_BO: Tensor,
    low_BO: Tensor,
    feedback_BB: Tensor,
    columns: _Columns,
) -> Tensor:
    """Round the columns of a block; completes ``target_BO``, writes ``delta_BO``, returns the levels."""
    num_columns = target_BO.shape[-2]
    level_BO = torch.empty_like(target_BO)
    high_BO = low_BO + (2**columns.grid.bits - 1)
    step = math.gcd(STEP, columns.moving)  # groups start where a step starts
    tensors = (target_BO, weight_BO, delta_BO, level_BO, scale_BO, low_BO, high_BO)
    rows = list(zip(*(tensor.unbind(-2) for tensor in tensors), strict=True))
    for start in range(0, num_columns, step):
        if columns.moving and start % columns.moving == 0:
            group = slice(start, start + columns.moving)
            parts = [part[..., group, :] for part in (target_BO, weight_BO, scale_BO, low_BO, high_BO)]
            _choose_group(parts, feedback_BB[..., group, group], columns)
        stop = min(start + step, num_columns)
        delta_SO = delta_BO[..., start:stop, :]
        for column in range(start, stop):
            if before := column - start:
                feedback_1S = feedback_BB.narrow(-2, column, 1).narrow(-1, start, before)
                _add_product_(target_BO.narrow(-2, column, 1), feedback_1S, delta_SO.narrow(-2, 0, before))
            target, weight, delta, level, scale, low, high = rows[column]
            torch.div(target, scale, out=level).round_()
            torch.clamp(level, low, high, out=level)
            torch.addcmul(weight, level, scale, value=-1, out=delta)
        if stop < num_columns:
            _add_product_(target_BO[..., stop:, :], feedback_BB[..., stop:, start:stop], delta_SO)
    return level_BO


def _choose_group(parts: Sequence[Tensor], feedback_SS: Tensor, columns: _Columns) -> None:
    """Choose the grid of the group that the sweep has reached; ``parts`` are target, weight, scale, low, high [S, O].

    The last three are written.

    The weights that the columns before it have left are W - D*, with D* the best unrounded correction: row by row
    D*_j = -(target_j - W_j) - sum_{k<j in the group} D*_k F_kj, a triangular system.
    """
    target_SO, weight_SO, scale_SO, low_SO, high_SO = parts
    correction_SO = torch.linalg.solve_triangular(feedback_SS, target_SO - weight_SO, upper=False, unitriangular=True)
    grid = replace(columns.grid, group_size=None)
    qparams = choose_qparams(_unstack(weight_SO + correction_SO).mT, grid, columns.scale_dtype)
    _unstack(scale_SO)[:] = qparams.scale_EOG.float().mT
    _unstack(low_SO)[:] = _low(qparams, grid).mT
    torch.add(low_SO, 2**grid.bits - 1, out=high_SO)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, with a dimension of experts or without."""
    if total.dim() == 2:
        total.addmm_(left, right)
    else:
        total.baddbmm_(left, right)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Experts side by side; a single one keeps no dimension for it, which spares a CPU the slower batched kernels."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def _unstack(tensor: Tensor) -> Tensor:
    """A view with a dimension of experts."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
