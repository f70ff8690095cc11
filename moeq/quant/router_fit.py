"""Refit a router to its original decisions once quantized weights before it have changed its inputs.

A router's logits are W x.  After the attention of a block, and all blocks before it, are quantized the router reads x'
in place of x, and tokens near a boundary go to other experts.  In the manner of the router calibration of QESC
(EAC-MoE, arXiv 2508.01625) the weight is re-fitted so that the logits on quantized inputs match those of the original
on its own inputs:

    minimise sum_t |W' x'_t - W x_t|^2 + lambda |W' - W|^2        over W'

which has the closed form W' = W + R^T X' (X'^T X' + lambda 1)^-1 with R = X W^T - X' W^T.  lambda is a share of the
mean diagonal of X'^T X'.  QESC weighs the logits of the chosen experts more; measured here it changed nothing
(benchmarks/LOG.md), so all logits count alike, which needs one Gram matrix in place of one per expert.

Shapes: T tokens, D width of the router's input, E logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterState:
    """Running sums over tokens, float64; they add up over batches and over ranks.

    Attributes:
        gram_DD: Sum of x' x'^T.
        cross_ED: Sum of (W x - W x') x'^T.
        before: Sum over tokens of the squared difference of the logits, with the router as it was.
        num_tokens: Tokens.
    """

    gram_DD: Tensor
    cross_ED: Tensor
    before: Tensor
    num_tokens: Tensor


def empty_router_state(num_logits: int, width: int, device: torch.device | str) -> RouterState:
    """Sums over no token."""
    shapes = ((width, width), (num_logits, width), (), ())
    return RouterState(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def add_router_inputs(state: RouterState, weight_ED: Tensor, x_TD: Tensor, logits_TE: Tensor) -> None:
    """Add tokens, in place.

    Args:
        state: Sums.
        weight_ED: The router as it was.
        x_TD: Its inputs in the quantized model.
        logits_TE: W x of the original model for the same tokens.
    """
    x_TD = x_TD.float()
    missing_TE = logits_TE.float() - x_TD @ weight_ED.float().mT
    state.gram_DD.add_((x_TD.mT @ x_TD).double())
    state.cross_ED.add_((missing_TE.mT @ x_TD).double())
    state.before.add_(missing_TE.double().square().sum())
    state.num_tokens.add_(len(x_TD))


def refit_router(weight_ED: Tensor, state: RouterState, ridge: float) -> tuple[Tensor, float]:
    """The router that matches the original's logits best, and what is left of the squared difference (0 to 1).

    Args:
        weight_ED: The router as it was.
        state: Sums over the calibration tokens.
        ridge: lambda as a share of the mean diagonal of the Gram matrix.

    Returns:
        float64 [E, D]; the share is that on the calibration tokens, 1 where nothing had to be repaired.

    Raises:
        ValueError: No token was seen, or the sums are not finite.
    """
    if not bool(state.num_tokens > 0) or not bool(torch.isfinite(state.gram_DD).all()):
        raise ValueError(
            f"the router has {int(state.num_tokens)} calibration tokens, or inputs that are not finite; "
            "use calibration data that reach this block, and check the model's weights"
        )
    identity_DD = torch.eye(len(state.gram_DD), dtype=torch.float64, device=state.gram_DD.device)
    damped_DD = state.gram_DD + ridge * state.gram_DD.diagonal().mean() * identity_DD
    change_ED = torch.linalg.solve(damped_DD, state.cross_ED.mT).mT
    # |R - X' dW^T|^2 = |R|^2 - 2 <dW, C> + <dW G, dW>
    left = state.before - 2.0 * (change_ED * state.cross_ED).sum() + ((change_ED @ state.gram_DD) * change_ED).sum()
    share = float(left / state.before) if bool(state.before > 0) else 1.0
    return weight_ED.double() + change_ED, share
