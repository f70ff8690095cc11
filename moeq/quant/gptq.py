"""GPTQ: quantize the columns of a weight one after another, each correcting for the errors of those before it.

Minimises tr(D H D^T), D = W - dequantized W, greedily (Frantar et al., 2022).  With H = R R^T, R upper triangular,

    tr(D H D^T) = sum_j R_jj^2 |D_j + sum_{k<j} D_k F_kj|^2,     F_kj = R_kj / R_jj,

so column j is rounded from the target W_j + sum_{k<j} D_k F_kj.  That is the weight which GPTQ's published code reaches
by updating all columns to the right with rows of the Cholesky factor of the inverse (QuIP, Chee et al., 2023, prove the
two equal).  This form needs no inverse and one factorisation instead of three, and the residuals give the error.

Speed.  The sweep is in ``moeq.quant.sweep``.  On a CPU a sweep of many rows is bound by arithmetic and memory: experts
go one at a time; one of few rows is bound by the cost of calling operations, so experts advance together, as they do on
a GPU, where launches are what costs.

Groups.  With act-order, columns are visited by decreasing Hessian diagonal and groups are static: those of the original
column order, with parameters from the original weight.  Without it a group's parameters are chosen when its first
column is reached, from the weights as the columns before it have left them.

Two-level and table grids (``moeq.quant.kinds``) are always committed beforehand. On two-level ones the sweep rounds the
weights plus the offsets of their groups. Their scales, and those of full-range grids, are fitted to the codes once more
(``two_level_refit``, ``scale_refit``), as are those of one bit.

Dead columns (zero Hessian diagonal: that input was never anything but 0) get the diagonal 1, which decouples them, so
each of their weights is rounded to its nearest level.  The published code zeroes them instead; but a column that was
dead in calibration need not be dead in use, and the same rule wipes out an expert that saw no token.

Shapes: E experts, O out features, I in features (``_IO`` in visiting order, with a leading dimension of experts where
they advance together), G groups per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeq.quant.factor import Feedback, factorise_each
from moeq.quant.grid import QParams, choose_qparams, lowest_level, real_values
from moeq.quant.scale_refit import refit_scales
from moeq.quant.solution import Solution, output_energies, output_energy, relative_error
from moeq.quant.spec import GridSpec, SolveSpec
from moeq.quant.sweep import Columns, stack, sweep, unstack
from moeq.quant.together import taken_together
from moeq.quant.two_level import join
from moeq.quant.two_level_refit import refit_integers
from moeq.quant.workspace import FEW_ROWS, num_together


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
            solved on several Hessians; they are kept.  A two-level grid is otherwise chosen by the Hessian's diagonal,
            and its integers, like the scales of tables, full-range grids and one bit, are fitted to the codes.  Groups
            that are chosen on the way (without act-order) have none beforehand.

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
    if qparams is not None and not _is_static(grid, solve):
        raise ValueError("qparams are given, but groups without act-order are chosen on the way; leave them out")
    size = num_together(out_features, in_features, weight_EOI.device.type)
    parts = []
    for start in range(0, num_experts, size):
        part = slice(start, start + size)
        known = None if qparams is None else qparams.experts(part)
        stacks = weight_EOI[part], hessian_EII[part]
        energy = output_energies(*stacks) if energy_E is None else energy_E[part]
        parts.append(_solve_together(*stacks, energy, grid, solve, scale_dtype, known))
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point_EOG for part in parts if part.zero_point_EOG is not None]
    supers = [part.super_scales for part in parts if part.super_scales is not None]
    return Solution(
        codes_EOI=torch.cat([part.codes_EOI for part in parts]),
        scale_EOG=torch.cat([part.scale_EOG for part in parts]),
        zero_point_EOG=torch.cat(zero_points) if zero_points else None,
        relative_error_E=torch.cat([part.relative_error_E for part in parts]),
        num_retries_E=torch.cat([part.num_retries_E for part in parts]),
        failed_E=torch.cat([part.failed_E for part in parts]),
        super_scales=join(supers) if supers else None,
    )


def _is_static(grid: GridSpec, solve: SolveSpec) -> bool:
    """Whether scales are chosen before the sweep, not on its way."""
    return grid.group_size is None or solve.act_order or grid.is_named


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
    factors = factorise_each(hessian_EII, solve.damping, solve.act_order)
    # One path for each shape, whatever the number of experts: the bits of a result do not depend on its company.
    together = taken_together(weight_EOI.device) or weight_EOI.shape[1] <= FEW_ROWS
    static = _is_static(grid, solve)
    chosen = qparams is None
    if static and qparams is None:
        qparams = choose_qparams(weight_EOI, grid, scale_dtype, hessian_EII.diagonal(dim1=1, dim2=2))
    shifted_EOI = weight_EOI if qparams is None else qparams.shift(weight_EOI)
    visited = [weight_OI.float().mT.contiguous() for weight_OI in shifted_EOI]
    if solve.act_order:
        visited = [weight_IO[factor.order_I] for weight_IO, factor in zip(visited, factors, strict=True)]
    weight_IO = stack(visited, together)
    if static:
        assert qparams is not None
        columns = _static_columns(qparams, factors, grid, together)
        codes_EOI, error_E = sweep(weight_IO, factors, columns, solve.column_block)
        if chosen and (grid.kind != "uniform" or grid.bits == 1) and grid.clip_search:
            qparams = _refit_each(weight_EOI, hessian_EII, codes_EOI, qparams, grid, factors, error_E)
    else:
        assert grid.group_size is not None
        grid.num_groups(weight_EOI.shape[2])  # raises where the groups do not fit
        assert grid.group_size is not None  # else it is static
        columns = Columns(torch.empty_like(weight_IO), torch.empty_like(weight_IO), grid, grid.group_size, scale_dtype)
        codes_EOI, error_E = sweep(weight_IO, factors, columns, solve.column_block)
        qparams = _moved_qparams(columns, grid.group_size)
    for expert_idx, factor in enumerate(factors):
        if factor.failed:  # its residuals were not weighed by the Hessian
            one = qparams.experts(slice(expert_idx, expert_idx + 1))
            codes_1OI = codes_EOI[expert_idx : expert_idx + 1]
            delta_OI = weight_EOI[expert_idx].float() - real_values(codes_1OI, one, grid)[0]
            error_E[expert_idx] = output_energy(delta_OI, hessian_EII[expert_idx].float())
    return Solution(
        codes_EOI=codes_EOI,
        scale_EOG=qparams.scale_EOG,
        zero_point_EOG=qparams.zero_point_EOG,
        relative_error_E=relative_error(error_E, energy_E),
        num_retries_E=torch.tensor([factor.num_retries for factor in factors], device=weight_EOI.device),
        failed_E=torch.tensor([factor.failed for factor in factors], device=weight_EOI.device),
        super_scales=qparams.super_scales,
    )


def _refit_each(
    weight_EOI: Tensor, hessian_EII: Tensor, codes_EOI: Tensor, qparams: QParams, grid: GridSpec,
    factors: Sequence[Feedback], error_E: Tensor,
) -> QParams:  # fmt: skip
    """Scales once more, for the codes; expert by expert, so that no result depends on its company."""
    refit = refit_integers if grid.two_level is not None else refit_scales
    fitted = []
    for expert, factor in enumerate(factors):
        one = slice(expert, expert + 1)
        known = qparams.experts(one)
        if not factor.failed:
            part = weight_EOI[one].float(), hessian_EII[one].float(), codes_EOI[one]
            known, error_E[one] = refit(*part, known, grid)
        fitted.append(known)
    minima = [part.zero_point_EOG for part in fitted if part.zero_point_EOG is not None]
    scale_EOG = torch.cat([part.scale_EOG for part in fitted])
    return QParams(scale_EOG, torch.cat(minima) if minima else None, qparams.super_scales)


def _static_columns(qparams: QParams, factors: Sequence[Feedback], grid: GridSpec, together: bool) -> Columns:
    """The grid of each column, visited in any order, from the groups of the original order."""
    low_EOG, scale_EOG = lowest_level(qparams, grid), qparams.divisors()
    if grid.group_size is None:
        shape = (-1, len(factors[0].order_I), -1)
        scales = list(scale_EOG.mT.expand(shape))
        lows = list(low_EOG.mT.expand(shape))
    else:
        groups = [factor.order_I // grid.group_size for factor in factors]
        scales = [scale_OG.mT[group_I] for scale_OG, group_I in zip(scale_EOG, groups, strict=True)]
        lows = [low_OG.mT[group_I] for low_OG, group_I in zip(low_EOG, groups, strict=True)]
    return Columns(stack(scales, together), stack(lows, together), grid, 0, qparams.scale_EOG.dtype)


def _moved_qparams(columns: Columns, group_size: int) -> QParams:
    """Parameters of the groups that were chosen on the way, read off the first column of each."""
    scale_EGO, low_EGO = unstack(columns.scale_IO)[:, ::group_size], unstack(columns.low_IO)[:, ::group_size]
    scale_EOG = scale_EGO.mT.to(columns.scale_dtype).contiguous()
    return QParams(scale_EOG, None if columns.grid.symmetric else (-low_EGO).mT.to(torch.uint8).contiguous())
