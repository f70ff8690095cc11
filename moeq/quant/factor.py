"""Feedback matrix of the GPTQ sweep, from a Hessian: order of the columns, damping, one Cholesky factorisation.

With P the order in which columns are visited and H' = P^T (H + shift) P = R R^T, R upper triangular with positive
diagonal, the sweep needs R_kj / R_jj: a Cholesky factorisation that starts at the last column, and no inverse.

A factorisation that fails is repeated in float64, then with the damping times 10, 100 and 1000; if all fail the
feedback is zero, which makes the sweep round to nearest, and the result says so.

On a CPU Hessians are factorised one after another, so that a factor does not depend on its company; elsewhere all of a
stack at once, and each attempt asks the device once how it went.

Shapes: E experts, I in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeq.kernels.onednn import add_product_
from moeq.quant.together import taken_together

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


def factorise_each(hessian_EII: Tensor, damping: float, act_order: bool) -> list[Feedback]:
    """Order, damp and factorise the Hessians of a stack (symmetric; computed with in float32)."""
    if taken_together(hessian_EII.device):
        return factorise_together(hessian_EII.float(), damping, act_order)
    return [factorise(hessian_II.float(), damping, act_order) for hessian_II in hessian_EII]


def factorise(hessian_II: Tensor, damping: float, act_order: bool) -> Feedback:
    """Order the columns, damp and factorise one Hessian (float32, symmetric)."""
    return factorise_together(hessian_II.unsqueeze(0), damping, act_order)[0]


def factorise_together(hessian_EII: Tensor, damping: float, act_order: bool) -> list[Feedback]:
    """Order the columns, damp and factorise some Hessians (float32, symmetric) by the same operations."""
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    if act_order:
        order_EI = torch.argsort(diagonal_EI, dim=1, descending=True, stable=True)
    else:
        order_EI = torch.arange(diagonal_EI.shape[1], device=hessian_EII.device).expand_as(diagonal_EI)
    # The mean over the columns that are alive: the ones set on dead columns have no scale in common with H.
    mean_E1 = torch.stack([diagonal_I.sum() for diagonal_I in diagonal_EI]).unsqueeze(1)
    mean_E1 = mean_E1 / (~dead_EI).sum(1, keepdim=True).clamp_min(1)
    found: dict[int, Feedback] = {}
    for num_retries, (dtype, multiple) in enumerate(ATTEMPTS):
        waiting = [expert for expert in range(len(hessian_EII)) if expert not in found]
        if not waiting:
            break
        shift_EI = torch.where(dead_EI, 1.0, multiple * damping * mean_E1).gather(1, order_EI)
        visited = [_visited(hessian_EII[expert], order_EI[expert], act_order) for expert in waiting]
        factor_EII = (visited[0].unsqueeze(0) if len(visited) == 1 else torch.stack(visited)).to(dtype)
        del visited
        factor_EII.diagonal(dim1=1, dim2=2).add_(shift_EI[waiting])
        succeeded_E = _reversed_cholesky_(factor_EII)
        feedback_EII = factor_EII.float()
        gain_EI = feedback_EII.diagonal(dim1=1, dim2=2).clone()
        succeeded_E &= (gain_EI > 0).all(1)
        feedback_EII /= gain_EI.unsqueeze(2)
        for position, (expert, succeeded) in enumerate(zip(waiting, succeeded_E.tolist(), strict=True)):
            if succeeded:
                parts = feedback_EII[position], gain_EI[position], shift_EI[expert], order_EI[expert]
                found[expert] = Feedback(*parts, num_retries, failed=False)
    return [found.get(expert) or _no_feedback(order_I) for expert, order_I in enumerate(order_EI)]


def _visited(hessian_II: Tensor, order_I: Tensor, act_order: bool) -> Tensor:
    """A copy with its columns in visiting order."""
    return hessian_II.index_select(0, order_I).index_select(1, order_I) if act_order else hessian_II.clone()


def _no_feedback(order_I: Tensor) -> Feedback:
    """Of a Hessian that has no factor."""
    return Feedback(
        feedback_II=torch.eye(len(order_I), device=order_I.device),
        gain_I=torch.ones(len(order_I), device=order_I.device),
        shift_I=torch.zeros(len(order_I), device=order_I.device),
        order_I=order_I,
        num_retries=len(ATTEMPTS),
        failed=True,
    )


def _reversed_cholesky_(factor_EII: Tensor) -> Tensor:
    """Turn each H into R^T, lower triangular, with R R^T = H, in place; returns which are positive definite, bool [E].

    Block rows from the last to the first, each one product with the rows done and one with the inverse of its diagonal
    block; this is nearly twice as fast on a CPU as the library's Cholesky of a reversed copy, which works in
    column-major order, and on a GPU all experts take part in each of these operations.  What is above the diagonal is
    left as it was.
    """
    size = factor_EII.shape[-1]
    identity_BB = torch.eye(BLOCK, dtype=factor_EII.dtype, device=factor_EII.device)
    infos = []
    for stop in range(size, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        panel_EBI = factor_EII[:, start:stop, :stop]
        if stop < size:
            add_product_(panel_EBI, factor_EII[:, stop:, start:stop].mT, factor_EII[:, stop:, :stop], sign=-1)
        lower_EBB, info_E = torch.linalg.cholesky_ex(panel_EBI[:, :, start:].flip(1, 2))
        infos.append(info_E)
        upper_EBB = lower_EBB.flip(1, 2)
        panel_EBI[:, :, start:] = upper_EBB.mT
        if start:  # the inverse of a block of 128 and a product: faster than a triangular solve with a long right side
            inverse_EBB = torch.linalg.solve_triangular(
                upper_EBB, identity_BB[: stop - start, : stop - start], upper=True
            )
            panel_EBI[:, :, :start] = inverse_EBB @ panel_EBI[:, :, :start]
    return ~torch.stack(infos).bool().any(0)
