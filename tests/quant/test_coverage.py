"""Coverage policies: shrinkage against a loop, fallbacks on record, refusals with a remedy."""

import pytest
import torch

from moeq.quant.coverage import CoverageSpec, regularize
from moeq.quant.hessian import HessianState, accumulate, empty_state, mean_hessian

NAMES = [f"model.layers.0.mlp.experts.{expert}.gate_proj" for expert in range(4)]
TOKENS = (300, 40, 5, 0)


def covered(tokens: tuple[int, ...] = TOKENS) -> HessianState:
    generator = torch.Generator().manual_seed(0)
    state = empty_state(len(tokens), 8, "cpu")
    for expert_idx, count in enumerate(tokens):
        affinity_T = torch.rand(count, generator=generator)
        accumulate(state, expert_idx, torch.randn(count, 8, generator=generator), affinity_T, 1)
    return state


@pytest.mark.parametrize("kappa", [0.0, 0.5, 256.0])
def test_shrinkage_equals_the_formula_expert_by_expert(kappa: float) -> None:
    state = covered()
    hessian_EII, use_rtn_E, _ = regularize(state, CoverageSpec("shrink", 32, kappa), NAMES)
    pool_II = sum(state.sum_EII[e].double() for e in range(4)) / sum(TOKENS)
    for expert, tokens in enumerate(TOKENS):
        total_II = state.sum_EII[expert].double() + kappa * pool_II
        expected_II = total_II / (tokens + kappa) if tokens + kappa else pool_II
        torch.testing.assert_close(hessian_EII[expert].double(), expected_II, rtol=1e-5, atol=1e-6)
    assert not use_rtn_E.any()


def test_experts_below_the_threshold_are_on_record_with_tokens_and_effective_samples() -> None:
    _, _, fallbacks = regularize(covered(), CoverageSpec("shrink", 32), NAMES)
    assert [fallback.weight for fallback in fallbacks] == NAMES[2:]
    assert [fallback.reason for fallback in fallbacks] == ["few calibration tokens", "no calibration tokens"]
    assert fallbacks[0].detail.startswith("5 tokens (")
    assert "effective), fewer than min_tokens (32); Hessian shrunk" in fallbacks[0].detail


def test_rtn_policy_flags_the_experts_below_the_threshold_and_leaves_the_others_alone() -> None:
    state = covered()
    hessian_EII, use_rtn_E, fallbacks = regularize(state, CoverageSpec("rtn", 41), NAMES)
    assert use_rtn_E.tolist() == [False, True, True, True]
    assert [fallback.weight for fallback in fallbacks] == NAMES[1:]
    assert all("rounded to nearest" in fallback.detail for fallback in fallbacks)
    assert torch.equal(hessian_EII[0], mean_hessian(state)[0])


def test_fail_policy_names_the_expert_its_tokens_and_remedies() -> None:
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj has 0 calibration tokens.*1 more.*lower min_tokens"):
        regularize(covered(), CoverageSpec("fail", 32), NAMES)
    _, use_rtn_E, fallbacks = regularize(covered((9, 8, 7, 6)), CoverageSpec("fail", 6), NAMES)
    assert not use_rtn_E.any()
    assert not fallbacks


def test_an_expert_without_tokens_gets_the_pool() -> None:
    state = covered()
    hessian_EII, _, _ = regularize(state, CoverageSpec(), NAMES)
    torch.testing.assert_close(hessian_EII[3], (state.sum_EII.sum(0) / sum(TOKENS)).float())


@pytest.mark.parametrize("policy", ["shrink", "rtn"])
def test_a_block_without_tokens_is_rounded_to_nearest(policy: str) -> None:
    spec = CoverageSpec(policy, 1)  # type: ignore[arg-type]
    hessian_EII, use_rtn_E, fallbacks = regularize(empty_state(4, 8, "cpu"), spec, NAMES)
    assert use_rtn_E.all()
    assert torch.isfinite(hessian_EII).all()
    assert [fallback.weight for fallback in fallbacks] == NAMES


def test_a_single_expert_keeps_its_own_hessian() -> None:
    state = covered((5,))
    hessian_EII, use_rtn_E, fallbacks = regularize(state, CoverageSpec("shrink", 32), NAMES[:1])
    assert torch.equal(hessian_EII, mean_hessian(state))
    assert not use_rtn_E.any()
    assert "no peers" in fallbacks[0].detail


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite_is_refused_by_name(value: float) -> None:
    state = covered()
    state.sum_EII[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"experts\.1\.gate_proj have NaN or infinite values \(1 of 4"):
        regularize(state, CoverageSpec(), NAMES)


def test_settings_out_of_range_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"policy \(zero\) must be one of"):
        CoverageSpec("zero", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_tokens \(0\) must be at least 1"):
        CoverageSpec("rtn", 0)
    with pytest.raises(ValueError, match=r"kappa \(-1\) must be a finite"):
        CoverageSpec("shrink", 10, -1)
    with pytest.raises(ValueError, match=r"names \(1\) must be as many as experts \(4\)"):
        regularize(covered(), CoverageSpec(), NAMES[:1])
