import pytest
import torch

from moeq.quant.spec import GridSpec, SolveSpec
from moeq.survey.sensitivity import (
    fisher_costs,
    hessian_costs,
    mean_square_gradients,
    pmq_costs,
    round_trip,
    row_energies,
    token_hessians,
)

GRID = GridSpec(bits=3, group_size=8, symmetric=False, clip_search=False)


def test_costs_equal_an_explicit_sum_over_tokens() -> None:
    num_tokens, counts = 40, [25, 15]
    weight, delta = torch.randn(2, 6, 8), 0.1 * torch.randn(2, 6, 8)
    inputs = [torch.randn(count, 8) for count in counts]
    gradients = [torch.randn(count, 6) for count in counts]
    hessians = token_hessians(torch.stack([x.T @ x for x in inputs]), torch.tensor(counts), num_tokens)
    gradient = torch.stack([g.square().mean(0) for g in gradients]).double()
    noise = [
        sum(float((delta[e] @ x)[rows].square().sum()) for x in inputs[e]) for e in range(2) for rows in (slice(0, 4),)
    ]
    energy = sum(float((weight[e] @ x)[:4].square().sum()) for e in range(2) for x in inputs[e])
    costs = hessian_costs(row_energies(delta, hessians), row_energies(weight, hessians), slice(0, 4))
    assert costs.tolist() == pytest.approx([each / energy for each in noise], rel=1e-4)
    expected = [
        sum(float(0.5 * (gradient[e] * (delta[e] @ x).square())[4:].sum()) for x in inputs[e]) / num_tokens
        for e in range(2)
    ]
    costs = fisher_costs(row_energies(delta, hessians), gradient, slice(4, 6), 2)
    assert costs.tolist() == pytest.approx(expected, rel=1e-4)
    costs = fisher_costs(row_energies(delta, hessians), gradient, slice(4, 6), 1)
    assert costs.tolist() == pytest.approx([2 * each for each in expected], rel=1e-4)


def test_an_expert_without_tokens_counts_as_one_average_token() -> None:
    sums = torch.stack([6 * torch.eye(3), torch.zeros(3, 3)])
    hessians = token_hessians(sums, torch.tensor([2.0, 0.0]), 4.0)
    torch.testing.assert_close(hessians[0], 1.5 * torch.eye(3))
    torch.testing.assert_close(hessians[1], 0.75 * torch.eye(3))


def test_gradients_of_rare_experts_are_pulled_toward_their_layer() -> None:
    sums = torch.tensor([[3200.0, 9600.0], [0.0, 0.0]], dtype=torch.float64)
    mean = mean_square_gradients(sums, torch.tensor([3200.0, 0.0]))
    assert mean[0].tolist() == pytest.approx([1.0, 3.0], rel=0.02)
    assert mean[1].tolist() == pytest.approx([2.0, 2.0])


def test_gptq_errs_less_than_rounding_in_the_norm_of_its_hessian() -> None:
    weight, inputs = torch.randn(1, 16, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    hessian = (inputs.T @ inputs / 200).unsqueeze(0)
    solved = round_trip(weight, GRID, torch.float32, hessian, SolveSpec())
    rounded = round_trip(weight, GRID, torch.float32, None, SolveSpec())
    errors = [float(row_energies(weight - each, hessian).sum()) for each in (solved, rounded)]
    assert errors[0] < 0.9 * errors[1]
    torch.testing.assert_close(rounded, weight, rtol=0, atol=0.7)


def test_pmq_raises_the_error_to_gamma() -> None:
    share, affinity, error = (torch.tensor([value]) for value in (0.25, 0.16, 3.0))
    assert pmq_costs(share, affinity, error).tolist() == pytest.approx([0.25 * 0.4**3 * 9.0])
    assert pmq_costs(share, affinity, error, alpha=2.0, beta=0.0, gamma=1.0).tolist() == pytest.approx([0.0625 * 3.0])
