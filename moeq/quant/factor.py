"""Feedback matrix of the GPTQ sweep, from a Hessian: order of the columns, damping, one Cholesky factorisation.

With P the order in which columns are visited and H' = P^T (H + shift) P = R R^T, R upper triangular with positive
diagonal, the sweep needs R_kj / R_jj: a Cholesky factorisation that starts at the last column, and no inverse.

A factorisation that fails is repeated in float64, then with the damping times 10, 100 and 1000; if all fail the
feedback is zero, which makes the sweep round to nearest, and the result says so.

Shapes: I in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns per step of the factorisation
# dtype and multiple of the damping of each attempt; relative to the mean diagonal, so 1000 x 0.01 dominates H.
ATTEMPTS = (
    (torch.float32, 1.0),
    (torch.float64, 1.0),
    (torch.float64, 10.0),
    (torch.float64, 100.0),
    (torch.float64, 1e3),
)


def retry_reason(num_retries: int) -> tuple[str, str]:
    """What the attempt after so many failed ones did otherwise, for the report: reason and detail."""
    if num_retries >= len(ATTEMPTS):
        return "factorisation failed", "rounded to nearest"
    dtype, multiple = ATTEMPTS[num_retries]
    if multiple == 1.0:
        return "factorisation retried in float64", f"{dtype} succeeded".removeprefix("torch.")
    return "factorisation retried with stronger damping", f"damping times {multiple:g}, after float64 failed"


@dataclass(frozen=True)
class Feedback:
    """The factor of one expert's Hessian, columns in the order they are visited.

    Attributes:
        feedback_II: float32 [j, k]: R_kj / R_jj for k < j, 1 on the diagonal, anything above; row j corrects column j.
        gain_I: float32, R_jj: what one unit of residual in column j adds to the error, squared.
        shift_I: float32, what was added to the diagonal (damping, and 1 for dead columns), in visiting order.
        order_I: int64, original index of the column that is visited j-th.
        num_retries: Failed attempts.
        failed: All attempts failed; the feedback is zero.
    """

    feedback_II: Tensor
    gain_I: Tensor
    shift_I: Tensor
    order_I: Tensor
    num_retries: int
    failed: bool


def factorise(hessian_II: Tensor, damping: float, act_order: bool) -> Feedback:
    """Order the columns, damp and factorise one Hessian (float32, symmetric)."""
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    if act_order:
        order_I = torch.argsort(diagonal_I, descending=True, stable=True)
    else:
        order_I = torch.arange(len(diagonal_I), device=hessian_II.device)
    # The mean over the columns that are alive: the ones set on dead columns have no scale in common with H.
    mean = diagonal_I.sum() / (~dead_I).sum().clamp_min(1)
    for num_retries, (dtype, multiple) in enumerate(ATTEMPTS):
        shift_I = torch.where(dead_I, 1.0, multiple * damping * mean)
        visited_II = hessian_II.index_select(0, order_I).index_select(1, order_I) if act_order else hessian_II.clone()
        factor_II = visited_II.to(dtype)
        factor_II.diagonal().add_(shift_I[order_I])
        succeeded = _reversed_cholesky_(factor_II)
        feedback_II = factor_II.float()
        gain_I = feedback_II.diagonal().clone()
        if succeeded and bool((gain_I > 0).all()):
            feedback_II /= gain_I.unsqueeze(1)
            return Feedback(feedback_II, gain_I, shift_I[order_I], order_I, num_retries, failed=False)
    return Feedback(
        feedback_II=torch.eye(len(diagonal_I), device=hessian_II.device),
        gain_I=torch.ones_like(diagonal_I),
        shift_I=torch.zeros_like(diagonal_I),
        order_I=order_I,
        num_retries=len(ATTEMPTS),
        failed=True,
    )


def _reversed_cholesky_(factor_II: Tensor) -> bool:
    """Turn H into R^T, lower triangular, with R R^T = H, in place; returns whether H is positive definite.

    Block rows from the last to the first, each one product with the rows done and one with the inverse of its diagonal
    block; this is nearly twice as fast on a CPU as the library's Cholesky of a reversed copy, which works in
    column-major order.  What is above the diagonal is left as it was.
    """
    size = len(factor_II)
    identity_BB = torch.eye(BLOCK, dtype=factor_II.dtype, device=factor_II.device)
    infos = []
    for stop in range(size, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        panel_BI = factor_II[start:stop, :stop]
        if stop < size:
            panel_BI.addmm_(factor_II[stop:, start:stop].mT, factor_II[stop:, :stop], alpha=-1)
        lower_BB, info = torch.linalg.cholesky_ex(panel_BI[:, start:].flip(0, 1))
        infos.append(info)
        upper_BB = lower_BB.flip(0, 1)
        panel_BI[:, start:] = upper_BB.mT
        if start:  # the inverse of a block of 128 and a product: faster than a triangular solve with a long right side
            inverse_BB = torch.linalg.solve_triangular(
                upper_BB, identity_BB[: stop - start, : stop - start], upper=True
            )
            panel_BI[:, :start] = inverse_BB @ panel_BI[:, :start]
    return not bool(torch.stack(infos).any())
