"""Shortage of a calibration set: which experts it still lacks, and which candidates would help most.

The use of a set that gives n_l^e tokens to expert e of block l is taken to be sum_l sum_e log(n_l^e + s_l): the first
tokens of an expert are worth much, further ones ever less.  Its derivative, in units of an evenly used expert's, is the
weight of one more token,

    a_l^e = (m_l + s_l) / (n_l^e + s_l)        m_l = mean_e n_l^e        s_l = 1 + m_l / 16

above 1 for experts that are short, at most 17 for one never used (so that an expert that the model cannot reach does
not outweigh all others), and the worth of a token is the mean of a_l^e over the experts it chose in all blocks.

Legend: N sequences, M candidates, L blocks with routed experts, E routed experts of a block.
"""

import torch
from torch import Tensor

SMOOTHING = 1 / 16


def smoothing(counts_LE: Tensor) -> Tensor:
    """s_l, float64 [L, 1]."""
    return 1 + SMOOTHING * counts_LE.double().mean(-1, keepdim=True)


def weights(counts_LE: Tensor) -> Tensor:
    """a_l^e, float64 [L, E], of a set that gives ``counts_LE`` tokens to each expert."""
    smoothing_L1 = smoothing(counts_LE)
    return (counts_LE.double().mean(-1, keepdim=True) + smoothing_L1) / (counts_LE + smoothing_L1)


def worth(counts_NLE: Tensor, weights_LE: Tensor) -> Tensor:
    """Mean worth of the tokens of each sequence, float64 [N]; 1 where experts are used evenly.

    Args:
        counts_NLE: Tokens of each sequence that chose each expert; leading dimensions are kept.
        weights_LE: Of ``weights``.
    """
    return (counts_NLE * weights_LE).sum((-1, -2)) / counts_NLE.sum((-1, -2)).clamp(min=1)


def pick(counts_MLE: Tensor, num: int, finished_LE: Tensor, scale: float) -> Tensor:
    """Candidates whose use of experts completes a set best, one after the other, int64 [num] in increasing order.

    Each pick maximises sum log(n + s) of what is there with it, s held at that of the expected whole.  A candidate may
    be picked again: what goes on from it is drawn anew, and where experts are short because hardly any candidate wakes
    them, those few are needed more than once.

    Args:
        counts_MLE: Tokens of each candidate that chose each expert.
        num: Candidates to pick.
        finished_LE: What the set already has.
        scale: Tokens that a candidate will have at the end for each that it has now.
    """
    gain_MLE = counts_MLE.double() * scale
    total_LE = finished_LE.double().expand(counts_MLE.shape[1:])
    smoothing_L1 = smoothing(total_LE + num * gain_MLE.mean(0))
    picked = []
    for _ in range(num):
        best = (total_LE + gain_MLE + smoothing_L1).log().sum((-1, -2)).argmax()
        total_LE = total_LE + gain_MLE[best]
        picked.append(best)
    return torch.stack(picked).sort().values
