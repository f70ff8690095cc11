"""Coverage policies: shrinkage against a loop, fallbacks on record, refusals with a remedy."""

import pytest
import torch

from moeq.quant.coverage import (
    SAMPLES_PER_FEATURE,
    CoverageSpec,
    Kappa,
    find_uncovered,
    hessians_to_solve,
    pool_of,
    regularize,
)
from moeq.quant.hessian import HessianState, accumulate, effective_samples, empty_state

NAMES = [f"model.layers.0.mlp.experts.{expert}.gate_proj" for expert in range(4)]
TOKENS = (300, 40, 5, 0)


Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]


def tokens_of(tokens: tuple[int, ...] = TOKENS) -> Rows:
    """Inputs and affinities of each expert."""
    generator = torch.Generator().manual_seed(0)
    draws = {expert: (torch.randn(count, 8, generator=generator), count) for expert, count in enumerate(tokens)}
    return {expert: (x_TI, torch.rand(count, generator=generator)) for expert, (x_TI, count) in draws.items()}


def covered(tokens: tuple[int, ...] = TOKENS, rows: Rows | None = None, power: float = 1.0) -> HessianState:
    state = empty_state(len(tokens), 8, "cpu")
    for expert_idx, (x_TI, affinity_T) in (rows or tokens_of(tokens)).items():
        accumulate(state, expert_idx, x_TI, affinity_T, power)
    return state


def reference_shrunk(rows: Rows, power: float, kappa: float) -> list[torch.Tensor]:
    """Token by token in float64, straight from the formula."""
    sums, weights, squares = [], [], []
    for x_TI, c_T in rows.values():
        total, weight, square = torch.zeros(8, 8, dtype=torch.float64), 0.0, 0.0
        for x_I, c in zip(x_TI.double(), c_T.double(), strict=True):
            w = float(c) ** power
            total, weight, square = total + w * torch.outer(x_I, x_I), weight + w, square + w * w
        sums, weights, squares = [*sums, total], [*weights, weight], [*squares, square]
    pool = sum(sums) / sum(weights)
    shrunk = []
    for total, weight, square in zip(sums, weights, squares, strict=True):
        samples = weight**2 / square if square else 0.0
        own = total / weight if weight else pool
        shrunk.append((samples * own + kappa * pool) / (samples + kappa) if samples + kappa else pool)
    return shrunk


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 256.0, "auto"])
def test_shrinkage_equals_the_formula_token_by_token(kappa: Kappa, power: float) -> None:
    state = covered(power=power)
    hessian_EII, _ = regularize(state, CoverageSpec("shrink", 32, kappa), NAMES)
    expected = reference_shrunk(tokens_of(), power, SAMPLES_PER_FEATURE * 8 if kappa == "auto" else kappa)
    for expert_II, expected_II in zip(hessian_EII, expected, strict=True):
        torch.testing.assert_close(expert_II.double(), expected_II, rtol=1e-5, atol=1e-6)


def test_shrinkage_does_not_depend_on_the_scale_of_an_experts_affinities() -> None:
    rows = tokens_of()
    rows[1] = rows[1][0], rows[1][1] / 100
    scaled = regularize(covered(rows=rows), CoverageSpec(), NAMES)[0]
    # The pool loses what the expert gave to it; the expert's own share of its Hessian stays.
    pool_II = pool_of(covered(rows=rows)).sum_EII[0] / pool_of(covered(rows=rows)).weight_sum_E
    samples = float(effective_samples(covered())[1])
    own_II = covered().sum_EII[1] / covered().weight_sum_E[1]
    kappa = CoverageSpec().samples_of_pool(8)
    expected_II = (samples * own_II + kappa * pool_II) / (samples + kappa)
    torch.testing.assert_close(scaled[1].double(), expected_II, rtol=1e-5, atol=1e-6)


def test_the_pool_may_come_from_elsewhere_and_experts_in_any_selection() -> None:
    state, spec = covered(), CoverageSpec()
    together = regularize(state, spec, NAMES)[0]
    some = HessianState(*(tensor[1:3] for tensor in state.tensors()))
    assert torch.equal(
        hessians_to_solve(some, spec, [1, 0], torch.zeros(2, dtype=torch.bool), pool_of(state)), together[[2, 1]]
    )
    use_rtn_E, records = find_uncovered(some, CoverageSpec("rtn", 32), NAMES[1:3], pool_of(state))
    assert use_rtn_E.tolist() == [False, True]
    assert [record.weight for record in records] == NAMES[2:3]


def test_experts_below_the_threshold_are_on_record_with_tokens_and_effective_samples() -> None:
    _, fallbacks = regularize(covered(), CoverageSpec("shrink", 32), NAMES)
    assert [fallback.weight for fallback in fallbacks] == NAMES[2:]
    assert [fallback.reason for fallback in fallbacks] == ["few calibration tokens", "no calibration tokens"]
    assert fallbacks[0].detail.startswith("5 tokens (")
    assert "effective), fewer than min_tokens (32); Hessian shrunk" in fallbacks[0].detail


def test_rtn_policy_flags_the_experts_below_the_threshold_and_leaves_the_others_alone() -> None:
    state = covered()
    hessian_EII, fallbacks = regularize(state, CoverageSpec("rtn", 41), NAMES)
    assert torch.equal(hessian_EII[1:], torch.eye(8).expand(3, 8, 8))
    assert [fallback.weight for fallback in fallbacks] == NAMES[1:]
    assert all("rounded to nearest" in fallback.detail for fallback in fallbacks)
    torch.testing.assert_close(hessian_EII[0], (state.sum_EII[0] / state.weight_sum_E[0]).float())


def test_fail_policy_names_the_expert_its_tokens_and_remedies() -> None:
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj has 0 calibration tokens.*1 more.*lower min_tokens"):
        regularize(covered(), CoverageSpec("fail", 32), NAMES)
    _, fallbacks = regularize(covered((9, 8, 7, 6)), CoverageSpec("fail", 6), NAMES)
    assert not fallbacks


def test_an_expert_without_tokens_gets_the_pool() -> None:
    state = covered()
    hessian_EII, _ = regularize(state, CoverageSpec(), NAMES)
    torch.testing.assert_close(hessian_EII[3], (state.sum_EII.sum(0) / state.weight_sum_E.sum()).float())


@pytest.mark.parametrize("policy", ["shrink", "rtn"])
def test_a_block_without_tokens_is_rounded_to_nearest(policy: str) -> None:
    spec = CoverageSpec(policy, 1)  # type: ignore[arg-type]
    hessian_EII, fallbacks = regularize(empty_state(4, 8, "cpu"), spec, NAMES)
    assert torch.equal(hessian_EII, torch.eye(8).expand(4, 8, 8))
    assert [fallback.weight for fallback in fallbacks] == NAMES


def test_a_single_expert_keeps_its_own_hessian() -> None:
    state = covered((5,))
    hessian_EII, fallbacks = regularize(state, CoverageSpec("shrink", 32), NAMES[:1])
    torch.testing.assert_close(hessian_EII, (state.sum_EII / state.weight_sum_E).float())
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
    with pytest.raises(ValueError, match=r"kappa \(-1\) must be auto or a finite"):
        CoverageSpec("shrink", 10, -1)
    with pytest.raises(ValueError, match=r"names \(1\) must be as many as experts \(4\)"):
        regularize(covered(), CoverageSpec(), NAMES[:1])
