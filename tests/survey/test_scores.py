import math

import pytest
import torch
from torch import Tensor

from moeq.allocation.plan import Choice
from moeq.survey.scores import SCORES, alphaq_costs, hill_alpha, kurtosis, outlier, outlier_group, score_weight


def slow_outlier(weight_OI: Tensor) -> float:
    """Eq. 5 as it is written, entry by entry."""
    best = 0.0
    for column in weight_OI.T.tolist():
        magnitudes = [abs(value) for value in column]
        best = max(best, max(magnitudes) / (sum(magnitudes) / len(magnitudes)))
    return best


def test_outlier_goes_down_input_columns_and_outlier_group_along_rows() -> None:
    weight = torch.randn(12, 8)
    assert outlier(weight) == pytest.approx(slow_outlier(weight), rel=1e-5)
    groups = [row[start : start + 4].abs() for row in weight for start in (0, 4)]
    assert outlier_group(weight, 4) == pytest.approx(max(float(g.max() / g.mean()) for g in groups), rel=1e-5)
    assert outlier_group(weight, None) == pytest.approx(slow_outlier(weight.T), rel=1e-5)


def test_a_row_of_large_weights_is_an_outlier_only_across_rows() -> None:
    weight = torch.ones(16, 8)
    weight[3] = 100.0
    assert outlier(weight) > 10
    assert outlier_group(weight, 4) == pytest.approx(1.0)


def test_kurtosis_is_3_for_a_gaussian_and_6_for_a_laplace() -> None:
    assert kurtosis(torch.randn(1000, 300)) == pytest.approx(3.0, abs=0.05)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((1000, 300))
    assert kurtosis(laplace) == pytest.approx(6.0, abs=0.2)


def test_the_hill_estimate_finds_the_exponent_of_a_power_law() -> None:
    # Quantiles of a density ~ l^-alpha have the survival function l^-(alpha - 1).
    alpha = 2.5
    eigenvalues = (torch.arange(1, 601) / 601.0) ** (-1 / (alpha - 1))
    orthogonal = torch.linalg.qr(torch.randn(600, 600)).Q
    assert hill_alpha(orthogonal * eigenvalues.sqrt()) == pytest.approx(alpha, rel=0.02)


def test_a_heavier_tail_scores_higher_and_costs_more() -> None:
    spectrum = torch.arange(1, 65) / 64.0
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    light, heavy = basis * spectrum**-0.2, basis * spectrum**-0.8
    assert score_weight("spectral_tail", heavy, None) > score_weight("spectral_tail", light, None)
    alphas = {"light": hill_alpha(light), "heavy": hill_alpha(heavy), "middle": 3.0}
    choices = {name: [Choice(2), Choice(4)] for name in alphas}
    table = alphaq_costs(alphas, dict.fromkeys(alphas, 0.5), choices, gamma=2.0)
    median = sorted(alphas.values())[1]
    assert table["heavy"][Choice(4)] == pytest.approx((median / alphas["heavy"]) ** 2 * 0.5 / 256)
    assert table["heavy"][Choice(2)] > table["light"][Choice(2)]


@pytest.mark.parametrize("name", SCORES)
def test_a_weight_of_zeros_has_a_finite_score(name: str) -> None:
    assert math.isfinite(score_weight(name, torch.zeros(8, 8), 4))


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="kurtosis"):
        score_weight("entropy", torch.ones(4, 4), None)
