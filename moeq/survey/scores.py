"""Scores of a weight that need no data; higher asks for more bits.

    outlier       max_j ( max_i |W_ij| / mean_i |W_ij| )        QuantMoE-Bench (arXiv 2406.08155, Eq. 5)
    outlier_group the same inside each group of a row, where a scale is shared: max over groups of max |w| / mean |w|
    kurtosis      E[(w - mean)^4] / Var(w)^2
    spectral_tail 1 / alpha, alpha the Hill estimate of the tail of the spectrum (AlphaQ, arXiv 2606.04980)

``outlier`` goes down each input column over the output rows, a direction that scales of rows absorb already;
``outlier_group`` is the control in the direction in which quantization works.

Hill: with eigenvalues l_1 >= l_2 >= ... of W^T W and k half of their number,
alpha = 1 + k / sum_{i<=k} ln(l_i / l_k+1).
A heavier tail has a smaller alpha.

Shapes: O out features, I in features, N weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeq.allocation.plan import Choice

SCORES = ("outlier", "outlier_group", "kurtosis", "spectral_tail")


def score_weight(name: str, weight_OI: Tensor, group_size: int | None) -> float:
    """One score of one weight, computed in float32.

    Args:
        name: One of ``SCORES``.
        weight_OI: Any float dtype.
        group_size: In-features that share a scale; None is the whole row.  Only ``outlier_group`` uses it.

    Raises:
        ValueError: The name is unknown, or the group size does not divide I.
    """
    weight_OI = weight_OI.float()
    if name == "outlier":
        return outlier(weight_OI)
    if name == "outlier_group":
        return outlier_group(weight_OI, group_size)
    if name == "kurtosis":
        return kurtosis(weight_OI)
    if name == "spectral_tail":
        return 1.0 / hill_alpha(weight_OI)
    raise ValueError(f"score ({name}) must be one of {', '.join(SCORES)}; choose kurtosis")


def outlier(weight_OI: Tensor) -> float:
    """Largest ratio of maximum to mean |w| down an input column; 1 for a weight of zeros."""
    return _largest_ratio(weight_OI.abs().mT)


def outlier_group(weight_OI: Tensor, group_size: int | None) -> float:
    """Largest ratio of maximum to mean |w| inside a group of a row; 1 for a weight of zeros."""
    in_features = weight_OI.shape[1]
    size = in_features if group_size is None else group_size
    if in_features % size:
        raise ValueError(
            f"group_size ({group_size}) must divide in_features ({in_features}); choose null for whole rows"
        )
    return _largest_ratio(weight_OI.abs().reshape(-1, size))


def kurtosis(weight_OI: Tensor) -> float:
    """Fourth standardised moment: 3 for a Gaussian; 0 for a constant weight."""
    centred = weight_OI.double() - weight_OI.double().mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square()) if float(variance) > 0 else 0.0


def hill_alpha(weight_OI: Tensor) -> float:
    """Tail index of the eigenvalues of W^T W: smaller is heavier; infinite where they are all equal.

    Zero eigenvalues are left out (a weight of rank 1 or 0 has no tail: infinite).
    """
    values_N = torch.linalg.svdvals(weight_OI.float()).double().square()
    values_N = values_N[values_N > values_N[0] * torch.finfo(torch.float32).eps ** 2]
    num_tail = len(values_N) // 2
    if num_tail == 0:
        return float("inf")
    total = float((values_N[:num_tail] / values_N[num_tail]).log().sum())
    return 1.0 + num_tail / total if total > 0 else float("inf")


def alphaq_costs(
    alphas: Mapping[str, float],
    variances: Mapping[str, float],
    choices: Mapping[str, Sequence[Choice]],
    gamma: float = 1.0,
) -> dict[str, dict[Choice, float]]:
    """AlphaQ's cost table, (median(alpha) / alpha)^gamma Var(W) 2^(-2 bits): no data, group sizes do not enter.

    Unit: squared weight; a small weight costs as much as a large one, as published.

    Args:
        alphas: ``hill_alpha`` by weight name.
        variances: Variance of the entries by weight name.
        choices: What each weight may get.
        gamma: How much the tail matters.
    """
    median = float(torch.tensor(list(alphas.values()), dtype=torch.float64).median())
    return {
        name: {choice: (median / alpha) ** gamma * variances[name] * 4.0**-choice.bits for choice in choices[name]}
        for name, alpha in alphas.items()
    }


def _largest_ratio(magnitude_NS: Tensor) -> float:
    """Max over rows of max / mean; rows of zeros count as 1."""
    mean_N = magnitude_NS.mean(1)
    ratio_N = torch.where(mean_N > 0, magnitude_NS.amax(1) / mean_N.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return float(ratio_N.max())
