"""The sweep of GPTQ: round the columns of a weight in visiting order, each from a target that the ones before it moved.

    target_j = W_j + sum_{k<j} F_jk (W_k - rounded_k),        rounded_j = the level nearest to target_j

with F the feedback of ``moeq.quant.factor``.  See ``moeq.quant.gptq`` for where this comes from.

Speed.  Columns are contiguous (W transposed), and most of the work is large products: ``WIDE`` columns gather from all
before them at once, blocks of ``column_block`` from what is before them among these; inside a block the s steps before
a step add to the s steps from it on, where s is the largest power of two that divides the number of steps done, so that
each pair meets once.  A step is a few columns one after another.  A single expert of many rows has no dimension of
experts and gathers inside a step by one matrix-vector product per column.  Small experts advance together, so that one
operation serves all of them; there a column is added to the ones after it by a product and a sum, element by element,
which cannot depend on who is in the stack.  On CUDA a step is one kernel (``kernels.sweep_triton``), where triton is.

Shapes: E experts, O out features, I in features in visiting order, G groups per row, W columns of a wide block, B of a
block, S of a step or a group.  Leading dots are a dimension of experts or none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from moeq.kernels.onednn import add_product_
from moeq.quant.factor import Feedback
from moeq.quant.grid import choose_qparams, lowest_level
from moeq.quant.kinds import SIGNS, TableKind
from moeq.quant.spec import GridSpec
from moeq.quant.tables import level_values, nearest_codes

# Columns per step of an expert alone, of some together and of a kernel.
STEP_ALONE, STEP_TOGETHER, STEP_CUDA = 8, 16, 64
WIDE = 512  # columns that gather at once


@dataclass(frozen=True)
class Columns:
    """The grid of every column: real = level * scale, with levels from low to low + 2^bits - 1, code = level - low.

    Where levels stand in a table, level is one of these and code its place; low is not used.

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

    @property
    def table(self) -> TableKind | None:
        """Levels that are no whole numbers apart from each other and zero: those of a table, and of one bit."""
        return SIGNS if self.grid.bits == 1 else self.grid.table


@dataclass(frozen=True)
class _Block:
    """What a block, or some columns of it, reads and writes; all [.., B, O].

    Attributes:
        target: Weights with the feedback of all columns before; those of later columns in the block are completed.
        weight: Original weights.
        delta: Weight minus rounded weight; written, and 0 before.
        level: Chosen levels; written.
        scale: Scales of the columns.
        low: Lowest levels.
        high: Highest levels.
    """

    target: Tensor
    weight: Tensor
    delta: Tensor
    level: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def columns(self, start: int, stop: int) -> "_Block":
        """Some of the columns."""
        return _Block(*(tensor[..., start:stop, :] for tensor in vars(self).values()))


def sweep(weight_IO: Tensor, factors: Sequence[Feedback], columns: Columns, column_block: int) -> tuple[Tensor, Tensor]:
    """Visit all columns; returns codes_EOI, in the original order of columns, and tr(D H D^T) of each expert."""
    together = weight_IO.dim() == 3
    feedback_II = stack([factor.feedback_II for factor in factors], together)
    gain_I = stack([factor.gain_I for factor in factors], together)
    shift_I = stack([factor.shift_I for factor in factors], together)
    delta_IO, codes_IO = torch.zeros_like(weight_IO), torch.empty_like(weight_IO, dtype=torch.uint8)
    error = torch.zeros(weight_IO.shape[:-2], dtype=torch.float64, device=weight_IO.device)
    if columns.moving:  # a group is chosen where a block starts
        column_block = columns.moving
    wide = column_block * max(1, WIDE // column_block)
    num_columns = weight_IO.shape[-2]
    for start in range(0, num_columns, column_block):
        stop, wide_start = min(start + column_block, num_columns), start - start % wide
        if start == wide_start:
            wide_stop = min(start + wide, num_columns)
            target_WO = weight_IO[..., start:wide_stop, :].clone()
            if start:
                add_product_(target_WO, feedback_II[..., start:wide_stop, :start], delta_IO[..., :start, :])
        target_BO = target_WO[..., start - wide_start : stop - wide_start, :]
        if start > wide_start:
            before = slice(wide_start, start)
            add_product_(target_BO, feedback_II[..., start:stop, before], delta_IO[..., before, :])
        parts = (part[..., start:stop, :] for part in (weight_IO, delta_IO, columns.scale_IO, columns.low_IO))
        weight_BO, delta_BO, scale_BO, low_BO = parts
        high_BO = _add_to_rows(low_BO, 2**columns.grid.bits - 1)
        block = _Block(target_BO, weight_BO, delta_BO, torch.empty_like(target_BO), scale_BO, low_BO, high_BO)
        _round_block(block, feedback_II[..., start:stop, start:stop], columns)
        table = columns.table
        places_BO = block.level - low_BO if table is None else nearest_codes(block.level, table)
        codes_IO[..., start:stop, :] = places_BO.to(torch.uint8)
        # target - rounded is the residual; the damping's share of the error is taken out again.
        residual_BO = target_BO.addcmul_(block.level, scale_BO, value=-1)
        square_B = (torch.linalg.vector_norm(residual_BO, dim=-1) * gain_I[..., start:stop]).square()
        damped_B = torch.linalg.vector_norm(delta_BO, dim=-1).square() * shift_I[..., start:stop]
        error += (square_B - damped_B).sum(-1, dtype=torch.float64)
    codes = [
        visited_IO.index_select(0, torch.argsort(factor.order_I)).mT.contiguous()
        for visited_IO, factor in zip(unstack(codes_IO), factors, strict=True)
    ]
    return torch.stack(codes), error.reshape(-1)


def _round_block(block: _Block, feedback_BB: Tensor, columns: Columns) -> None:
    """Round the columns of a block: completes its target, writes its delta and level."""
    if columns.moving:
        _choose_group(block, feedback_BB, columns)
    num_columns = block.target.shape[-2]
    round_step, step = _choose_loop(block.target, columns.table)
    for start in range(0, num_columns, step):
        stop = min(start + step, num_columns)
        part = block.columns(start, stop)
        round_step(part, feedback_BB[..., start:stop, start:stop])
        if stop < num_columns:
            steps = stop // step
            reach = (steps & -steps) * step
            before, after = slice(stop - reach, stop), slice(stop, stop + reach)
            add_product_(block.target[..., after, :], feedback_BB[..., after, before], block.delta[..., before, :])


def _choose_loop(target_BO: Tensor, table: TableKind | None) -> tuple[Callable[[_Block, Tensor], None], int]:
    """What rounds the columns of a step, and how many columns a step has."""
    if target_BO.dim() == 2:
        return partial(_round_one, table=table), STEP_ALONE
    if target_BO.is_cuda and table is None and find_spec("triton") is not None:
        return _round_by_kernel, STEP_CUDA
    return partial(_round_together, table=table), STEP_TOGETHER


def _round_by_kernel(part: _Block, feedback_SS: Tensor) -> None:
    """Round the columns of some experts on a GPU, in one launch."""
    from moeq.kernels.sweep_triton import (
        round_columns,  # triton takes seconds to import, and CPU builds of torch lack it
    )

    tensors = (part.target, part.weight, part.delta, part.level, part.scale, part.low, part.high)
    round_columns(*tensors, feedback_SS)


def _round_one(part: _Block, feedback_SS: Tensor, table: TableKind | None) -> None:
    """Round the columns of one expert; deltas not yet reached are 0, so each column may gather from all of them."""
    rows = zip(*(_rows(tensor) for tensor in vars(part).values()), feedback_SS.tril(-1).unbind(), strict=True)
    delta_OS = part.delta.mT
    for position, (target, weight, delta, level, scale, low, high, feedback_S) in enumerate(rows):
        if position:
            target.addmv_(delta_OS, feedback_S)
        _round_column(table, target, weight, delta, level, scale, low, high)


def _round_together(part: _Block, feedback_SS: Tensor, table: TableKind | None) -> None:
    """Round the columns of some experts; each is added to the ones after it, bit for bit as for an expert alone."""
    num_columns = part.target.shape[-2]
    rows = list(zip(*(_rows(tensor) for tensor in vars(part).values()), strict=True))
    work_SO = torch.empty_like(part.target)
    for column, row in enumerate(rows):
        _round_column(table, *row)
        if column + 1 < num_columns:
            later = slice(column + 1, num_columns)
            delta_1O = part.delta[..., column : column + 1, :]
            torch.mul(feedback_SS[..., later, column : column + 1], delta_1O, out=work_SO[..., later, :])
            part.target[..., later, :] += work_SO[..., later, :]


def _rows(tensor_SO: Tensor) -> Sequence[Tensor]:
    """Views of the columns of a step; a grid that is one row for all columns is one view: making views costs time."""
    if tensor_SO.stride(-2) == 0:
        return [tensor_SO[..., 0, :]] * tensor_SO.shape[-2]
    return tensor_SO.unbind(-2)


def _add_to_rows(tensor_BO: Tensor, value: int) -> Tensor:
    """``tensor + value``, still one row for all columns where it was one."""
    if tensor_BO.stride(-2) == 0:
        return (tensor_BO[..., :1, :] + value).expand_as(tensor_BO)
    return tensor_BO + value


def _round_column(
    table: TableKind | None, target: Tensor, weight: Tensor, delta: Tensor, level: Tensor, scale: Tensor, low: Tensor,
    high: Tensor,
) -> None:  # fmt: skip
    """Round one column [.., O]: writes its level and delta."""
    torch.div(target, scale, out=level)
    if table is None:
        torch.clamp(level.round_(), low, high, out=level)
    else:
        level.copy_(level_values(nearest_codes(level, table), table))
    torch.addcmul(weight, level, scale, value=-1, out=delta)


def _choose_group(group: _Block, feedback_SS: Tensor, columns: Columns) -> None:
    """Choose the grid of the group that the sweep has reached; writes its scale, low and high.

    The weights that the columns before it have left are W - D*, with D* the best unrounded correction: row by row
    D*_j = -(target_j - W_j) - sum_{k<j in the group} D*_k F_kj, a triangular system.
    """
    correction_SO = group.target - group.weight
    correction_SO = torch.linalg.solve_triangular(feedback_SS, correction_SO, upper=False, unitriangular=True)
    grid = replace(columns.grid, group_size=None)
    qparams = choose_qparams(unstack(group.weight + correction_SO).mT, grid, columns.scale_dtype)
    unstack(group.scale)[:] = qparams.scale_EOG.float().mT
    unstack(group.low)[:] = lowest_level(qparams, grid).mT
    torch.add(group.low, 2**grid.bits - 1, out=group.high)


def stack(tensors: Sequence[Tensor], together: bool) -> Tensor:
    """Experts side by side; a single wide one keeps no dimension for it, which spares it slower kernels."""
    return torch.stack(list(tensors)) if together else tensors[0]


def unstack(tensor: Tensor) -> Tensor:
    """A view with a dimension of experts."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
