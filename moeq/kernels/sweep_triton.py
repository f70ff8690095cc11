"""The inner loop of the GPTQ sweep on a GPU: one Triton kernel rounds the columns of a step for all experts and rows.

    target_j += sum_{k<j} F_jk delta_k,   level_j = clamp(round(target_j / scale_j), low_j, high_j),
    delta_j = W_j - level_j scale_j

Rows of a weight do not depend on one another, so each program takes ``ROWS`` of them (of one expert) through all
columns and keeps their deltas in registers: S x ROWS float32 over one warp, 64 per thread for the 64 columns of a step.
A column is then a few loads, one weighted sum over the deltas and a handful of operations, where the torch version
launches some ten kernels.  One warp, because the sum over columns then needs no barrier between warps.

Twin of ``_round_together`` in ``moeq.quant.sweep``: the same numbers but for the order of a sum of at most S products
in float32.  Division is correctly rounded (Triton's own is not), and rounding is to even, by way of 1.5 * 2^23.

Run so far in Triton's interpreter only (tests/kernels/test_sweep_triton.py): speed on a GPU is not known.

Shapes: E experts, O out features, S columns of a step, R rows of a program.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows per program, one per lane of a warp


def round_columns(
    target_ESO: Tensor,
    weight_ESO: Tensor,
    delta_ESO: Tensor,
    level_ESO: Tensor,
    scale_ESO: Tensor,
    low_ESO: Tensor,
    high_ESO: Tensor,
    feedback_ESS: Tensor,
) -> None:
    """Round the columns of a step; all float32, any strides over E and S, rows next to each other or the same.

    Args:
        target_ESO: Weights with the feedback of all columns before the step; completed in place.
        weight_ESO: Original weights.
        delta_ESO: Weight minus rounded weight; written.
        level_ESO: Chosen levels, whole numbers; written.
        scale_ESO: Scales, not 0.
        low_ESO: Lowest levels.
        high_ESO: Highest levels, up to 255.
        feedback_ESS: [j, k] for k < j: what a delta in column k adds to column j; the rest is not read.
    """
    experts, columns, rows = target_ESO.shape
    tensors = (target_ESO, weight_ESO, delta_ESO, level_ESO, scale_ESO, low_ESO, high_ESO)
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    grid = (triton.cdiv(rows, ROWS), experts)
    padded = triton.next_power_of_2(columns)
    _round_columns[grid](
        *tensors, feedback_ESS, *strides, *feedback_ESS.stride(), columns, rows, PADDED=padded, ROWS=ROWS, num_warps=1
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _round_columns(  # type: ignore[no-untyped-def]  # noqa: ANN202
    target, weight, delta, level, scale, low, high, feedback,  # noqa: ANN001
    target_e, target_s, target_o, weight_e, weight_s, weight_o, delta_e, delta_s, delta_o,  # noqa: ANN001
    level_e, level_s, level_o, scale_e, scale_s, scale_o, low_e, low_s, low_o, high_e, high_s, high_o,  # noqa: ANN001
    feedback_e, feedback_s, feedback_k, columns, rows,  # noqa: ANN001
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One expert (second index of the program), ROWS of its rows (first), all columns of the step."""
    expert = tl.program_id(1).to(tl.int64)  # products with strides of stacks of experts pass 2^31
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < rows
    target += expert * target_e + row_R * target_o
    weight += expert * weight_e + row_R * weight_o
    delta += expert * delta_e + row_R * delta_o
    level += expert * level_e + row_R * level_o
    scale += expert * scale_e + row_R * scale_o
    low += expert * low_e + row_R * low_o
    high += expert * high_e + row_R * high_o
    k_S = tl.arange(0, PADDED)
    feedback += expert * feedback_e + k_S * feedback_k
    delta_SR = tl.zeros((PADDED, ROWS), dtype=tl.float32)
    for j in range(columns):
        feedback_S = tl.load(feedback + j * feedback_s, mask=k_S < j, other=0.0)
        target_R = tl.load(target + j * target_s, mask=inside_R, other=0.0)
        target_R += tl.sum(feedback_S[:, None] * delta_SR, axis=0)
        scale_R = tl.load(scale + j * scale_s, mask=inside_R, other=1.0)
        low_R = tl.load(low + j * low_s, mask=inside_R, other=0.0)
        high_R = tl.load(high + j * high_s, mask=inside_R, other=0.0)
        # Clamped to whole numbers first, which rounding to whole numbers keeps: the shift needs small values.
        level_R = tl.minimum(tl.maximum(tl.div_rn(target_R, scale_R), low_R), high_R)
        level_R = (level_R + 12582912.0) - 12582912.0
        delta_R = tl.load(weight + j * weight_s, mask=inside_R, other=0.0) - level_R * scale_R
        tl.store(target + j * target_s, target_R, mask=inside_R)
        tl.store(level + j * level_s, level_R, mask=inside_R)
        tl.store(delta + j * delta_s, delta_R, mask=inside_R)
        delta_SR = tl.where(k_S[:, None] == j, delta_R[None, :], delta_SR)
